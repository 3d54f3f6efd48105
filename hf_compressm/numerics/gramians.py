"""Gramians of diagonal systems in closed form, and norms that follow from them.

| symbol | meaning | shape |
|---|---|---|
| P | controllability Gramian, `sum_k A^k B B^H A^kH`: covariance of the state under white input | `(n, n)` |
| Q | observability Gramian, `sum_k A^kH C^H C A^k`: energy that a state passes to the future output | `(n, n)` |
| n | order: N complex states, or 2N real ones | |

Discrete time, |eigenvalue| < 1. Source: Antoulas, Approximation of Large-Scale Dynamical Systems (2005), section 4.3;
for a diagonal A the Stein equations decouple into one division per entry (arXiv 2510.02823, section 3).
"""

import torch
from torch import Tensor

from hf_compressm.numerics.systems import DiagonalSystem


def gramians(system: DiagonalSystem, realization: str = "real") -> tuple[Tensor, Tensor]:
    """Both Gramians of a stable system.

    Args:
        system: eigenvalues strictly inside the unit circle.
        realization: `"complex"`, the N complex states as they are; `"real"`, the 2N coordinates
            `sqrt(2) [Re h; Im h]` of the real map that the layer computes.

    Returns:
        P and Q: complex128 `(N, N)`, or float64 `(2N, 2N)`.

    Raises:
        ValueError: for another realization, for NaN or infinity, or if an eigenvalue is not inside the unit circle.
    """
    check_realization(realization)
    if not system.is_finite:
        raise ValueError(
            "Gramians need finite numbers; the eigenvalues, B or C of this system hold NaN or infinity. "
            "Go back to a checkpoint from before the divergence."
        )
    if not system.is_stable:
        raise ValueError(
            f"Gramians exist only for |eigenvalue| < 1; the largest is {system.eigenvalues.abs().max().item():.6g}. "
            "Lower the learning rate of the eigenvalues, or clip them, before compressing."
        )
    if realization == "complex":
        a, B, b, D = system.eigenvalues, system.B, system.eigenvalues.conj(), system.C.mH
        return _stein(a, B, a, B), _stein(b, D, b, D)
    return _real_gramian(system.eigenvalues, system.B), _real_gramian(system.eigenvalues.conj(), system.C.mH / 2)


def h2_norm(system: DiagonalSystem) -> float:
    """Root mean square of the real output under white input of unit variance, summed over outputs.

    `||G||_2^2 = sum_k ||Re(C A^k B)||_F^2`.
    """
    return max(_h2_product(system, system), 0.0) ** 0.5


def relative_h2_error(system: DiagonalSystem, reduced: DiagonalSystem) -> float:
    """`||G - G_r||_2 / ||G||_2`, as the root of a difference exact to half of the digits; 0 if there is no output."""
    energy = _h2_product(system, system)
    if not energy > 0:
        return 0.0
    lost = energy - 2 * _h2_product(system, reduced) + _h2_product(reduced, reduced)
    return (max(lost, 0.0) / energy) ** 0.5


def check_realization(realization: str) -> None:
    """Refuse anything but `"real"` and `"complex"`."""
    if realization not in ("real", "complex"):
        raise ValueError(f"realization must be 'real' or 'complex', got {realization!r}.")


def real_input_output(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Real B `(2N, H)` and C `(P, 2N)` in the coordinates `sqrt(2) [Re h; Im h]`, float64."""
    B = torch.cat([system.B.real, system.B.imag]) * 2**0.5
    C = torch.cat([system.C.real, -system.C.imag], dim=1) / 2**0.5
    return B, C


def _h2_product(first: DiagonalSystem, second: DiagonalSystem) -> float:
    """`sum_k <Re(C A^k B), Re(C' A'^k B')>`: covariance of two real outputs under the same white input."""
    S = _stein(first.eigenvalues, first.B, second.eigenvalues, second.B)
    R = _pseudo_stein(first.eigenvalues, first.B, second.eigenvalues, second.B)
    return float(((first.C @ S) * second.C.conj() + (first.C @ R) * second.C).real.sum() / 2)


def _stein(a: Tensor, B: Tensor, b: Tensor, D: Tensor) -> Tensor:
    """Solve `X - diag(a) X diag(b)^H = B D^H`: `X_ij = (B D^H)_ij / (1 - a_i conj(b_j))`, `E[h g^H]` of two states."""
    return (B @ D.mH) / (1 - a[:, None] * b.conj())


def _pseudo_stein(a: Tensor, B: Tensor, b: Tensor, D: Tensor) -> Tensor:
    """Solve `X - diag(a) X diag(b) = B D^T`: `E[h g^T]` under white input, where `_stein` gives `E[h g^H]`."""
    return (B @ D.mT) / (1 - a[:, None] * b)


def _real_gramian(eigenvalues: Tensor, B: Tensor) -> Tensor:
    """Covariance of `sqrt(2) [Re h; Im h]` under white input, float64 `(2N, 2N)`, from `E[h h^H]` and `E[h h^T]`."""
    S, R = _stein(eigenvalues, B, eigenvalues, B), _pseudo_stein(eigenvalues, B, eigenvalues, B)
    upper, lower = torch.cat([(S + R).real, (R - S).imag], 1), torch.cat([(R + S).imag, (S - R).real], 1)
    return torch.cat([upper, lower])
