"""Balanced truncation of diagonal systems by the square-root method.

| symbol | meaning | shape |
|---|---|---|
| P, Q | controllability and observability Gramian | `(n, n)` |
| L_P, L_Q | factors, `P = L_P L_P^H` | `(n, n)` |
| sigma | Hankel singular values (HSVs), `sqrt(eig(P Q))` | `(n,)` |
| T, W | right and left projection, `W T = 1` | `(n, m)`, `(m, n)` |

Discrete time; n is 2N for the real map of N stored complex states and N for the complex one. The spectrum may fall
over many decades, so nothing is inverted and `P Q` is never formed. Sources: Antoulas (2005), section 7.3; Laub et
al., IEEE TAC 32 (1987); CompreSSM, arXiv 2510.02823.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compressm.numerics.gramians import check_realization, gramians, real_input_output
from hf_compressm.numerics.modal import Modes, gain_ratio, modal_form
from hf_compressm.numerics.systems import DiagonalSystem


NUMERICAL_RANK = 1e-12
"""HSVs below this share of the largest are round-off of float64 Gramians: no state is kept for them."""

SQUARING_LIMIT = 1e-6
"""Squared HSVs come from an eigenproblem, in half of the SVD's time, if the smallest is above this share of the
largest: the squaring then costs at most six of float64's sixteen digits."""


@dataclass(frozen=True, eq=False)
class Balancing:
    """A system with its Gramians factored: everything that a cut to any rank needs.

    Attributes:
        system: the system that was balanced.
        realization: `"real"` or `"complex"`.
        hankel_singular_values: float64 `(n,)`, descending.
        right: `(n, n)`, columns `L_P V`; the projection T of state i is column i over `sqrt(sigma_i)`.
        left: `(n, n)`, rows `U^H L_Q^H`.
        state_scores: what each present state passes on by itself, `sqrt(P_ii Q_ii)`, float64 `(N,)`: the HSV of this
            state alone.
        measured: whether P is measured on data; then neither error bound nor stability of every cut is proven.
    """

    system: DiagonalSystem
    realization: str
    hankel_singular_values: Tensor
    right: Tensor
    left: Tensor
    state_scores: Tensor
    measured: bool = False


@dataclass(frozen=True, eq=False)
class BalancedTruncation:
    """A reduced system and its relation to the full one.

    Attributes:
        system: at most `rank` complex states.
        hankel_singular_values: float64, descending, of the full system.
        kept: how many balanced states were kept, counted as the HSVs are.
        error_bound: `2 * sum of the discarded HSVs`, an upper bound of the H-infinity error.
        to_reduced: real `(2r, 2N)`, `[Re h_r; Im h_r] = to_reduced [Re h; Im h]`.
        from_reduced: real `(2N, 2r)`, the way back, `[Re h; Im h] ~ from_reduced [Re h_r; Im h_r]`.
    """

    system: DiagonalSystem
    hankel_singular_values: Tensor
    kept: int
    error_bound: float
    to_reduced: Tensor
    from_reduced: Tensor


def hankel_singular_values(system: DiagonalSystem, realization: str = "real") -> Tensor:
    """Hankel singular values of a stable diagonal system.

    Args:
        system: N complex states, |eigenvalue| < 1.
        realization: `"real"` for the real map `Re(C h)`, `"complex"` for the complex one as in the paper's code.

    Returns:
        float64, descending, `(2N,)` for `"real"` and `(N,)` for `"complex"`. Costs O(n^3).

    Raises:
        ValueError: if the system is not stable.
    """
    return balance(system, realization).hankel_singular_values


def balanced_truncation(system: DiagonalSystem, rank: int, realization: str = "real") -> BalancedTruncation:
    """Reduce a system to at most `rank` complex states, `||G - G_r||_inf <= 2 * sum of discarded HSVs`.

    In the real realization conjugate pairs share a slot and real eigenvalues take one each; the largest real order
    that fits is used. A `rank` of N or more returns the system unchanged.

    Args:
        system: N complex states, |eigenvalue| < 1.
        rank: number of complex states to keep, at least 1.
        realization: `"real"` (default) or `"complex"` (the paper's own).

    Raises:
        ValueError: for a rank below 1 or an unstable system.
    """
    return truncate(balance(system, realization), rank)


def balance(system: DiagonalSystem, realization: str = "real", covariance: Tensor | None = None) -> Balancing:
    """Factor both Gramians and take the SVD of `L_Q^H L_P`.

    Args:
        system: N complex states, |eigenvalue| < 1.
        realization: `"real"` or `"complex"`.
        covariance: `(2N, 2N)`, covariance of `sqrt(2) [Re h; Im h]` measured on data, in place of the closed-form P
            (which assumes white input). Real realization only. The error bound then no longer holds.
    """
    check_realization(realization)
    P, Q = gramians(system, realization)
    if covariance is not None:
        if realization != "real" or covariance.shape != P.shape:
            raise ValueError(
                f"A measured covariance goes with realization='real' and has shape {tuple(P.shape)}; "
                f"got {tuple(covariance.shape)} with realization={realization!r}."
            )
        P = covariance.to(P)
    energies = [X.diagonal().real.view(-1, system.order).sum(dim=0) for X in (P, Q)]
    scores = (energies[0] * energies[1]).sqrt()
    return Balancing(system, realization, *_balanced_axes(P, Q), scores, covariance is not None)


def truncate(balancing: Balancing, rank: int, order: Tensor | None = None) -> BalancedTruncation:
    """Keep the first states of a balanced system, and bring the result back to diagonal form.

    Args:
        balancing: from `balance`.
        rank: number of complex slots, at least 1.
        order: permutation of the balanced states, most wanted first (default: descending HSV).

    Raises:
        ValueError: for a rank below 1, for a system without output that would have to shrink, or if no order up to
            `rank` has a stable diagonal form; with a measured covariance, the largest that fits must be stable.
    """
    system, sigma = balancing.system, balancing.hankel_singular_values
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    if rank >= system.order:
        identity = torch.eye(2 * system.order, dtype=torch.float64)
        return BalancedTruncation(system, sigma, sigma.numel(), 0.0, identity, identity)
    order = torch.arange(sigma.numel()) if order is None else order
    order = order[sigma[order] > NUMERICAL_RANK * sigma[0]]
    if order.numel() == 0:
        raise ValueError(
            "The system passes nothing from its input to its output (B or C is zero), so its states have no ranking. "
            "Leave this layer out with ignore_layers."
        )
    states = min(order.numel(), 2 * rank if balancing.realization == "real" else rank)
    A = _state_matrix(balancing, *_projections(balancing, order[:states]))
    while states > 0:
        excess = max(_count_slots(A[:states, :states]) - rank, 0)
        reduced = None if excess else _project(balancing, order[:states])
        if reduced is not None and reduced.system.order <= rank:
            if reduced.system.is_stable:
                return reduced
            if balancing.measured:
                break
        states -= max(excess // 2, 1)  # one state less may free several slots, so dropping all the excess is too much
    raise ValueError(
        f"No stable diagonal system of at most {rank} states was found. "
        "Use criterion='hankel', a larger size, or leave this layer out with ignore_layers."
    )


def factor(P: Tensor) -> Tensor:
    """Factor L of a positive semidefinite `P = L L^H`: Cholesky, or eigenvectors with negative round-off clipped."""
    L, failed = torch.linalg.cholesky_ex(P)
    if not bool(failed.any()):
        return L
    values, vectors = torch.linalg.eigh((P + P.mH) / 2)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]


def _balanced_axes(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HSVs `(n,)`, `L_P V` and `U^H L_Q^H`, from the SVD `L_Q^H L_P = U S V^H` or its eigenproblem."""
    L_P = factor(P)
    squared = L_P.mH @ Q @ L_P  # V S^2 V^H
    pivots, failed = torch.linalg.cholesky_ex(squared)
    pivots = pivots.diagonal().abs().square()  # never below the smallest eigenvalue
    if not bool(failed) and pivots.min() > SQUARING_LIMIT * pivots.max():
        values, V = torch.linalg.eigh(squared)
        if values[0] > SQUARING_LIMIT * values[-1]:
            sigma, right = values.flip(0).sqrt(), L_P @ V.flip(1)
            return sigma, right, (right.mH @ Q) / sigma[:, None]
    L_Q = factor(Q)
    U, sigma, V_h = torch.linalg.svd(L_Q.mH @ L_P)
    return sigma, L_P @ V_h.mH, U.mH @ L_Q.mH


def _project(balancing: Balancing, states: Tensor) -> BalancedTruncation | None:
    """Project onto the given balanced states and diagonalise; return None if that is not possible."""
    system, sigma = balancing.system, balancing.hankel_singular_values
    W, T = _projections(balancing, states)
    B, C = real_input_output(system) if balancing.realization == "real" else (system.B, system.C)
    modes = modal_form(_state_matrix(balancing, W, T), W @ B, C @ T, gain_ratio(system))
    if modes is None:
        return None
    bound = 2 * float(sigma.sum() - sigma[states].sum())
    maps = _real_maps(modes, W, T)
    return BalancedTruncation(modes.system, sigma, states.numel(), max(bound, 0.0), *maps)


def _projections(balancing: Balancing, states: Tensor) -> tuple[Tensor, Tensor]:
    """W `(m, n)` and T `(n, m)` of the given balanced states; `W T = 1`, disturbed by round-off, is restored.

    With eigenvalues within 1e-12 of the unit circle, the round-off would decide whether the result is stable.
    """
    weight = balancing.hankel_singular_values[states].rsqrt()
    W, T = weight[:, None] * balancing.left[states], balancing.right[:, states] * weight
    return torch.linalg.solve(W @ T, W), T


def _state_matrix(balancing: Balancing, W: Tensor, T: Tensor) -> Tensor:
    """`W A T`, `(m, m)`; its leading blocks belong to the first of the states."""
    eigenvalues = balancing.system.eigenvalues
    if balancing.realization == "complex":
        return (W * eigenvalues) @ T
    left, right = W.chunk(2, dim=1)  # A is diag(Re lambda) twice on its diagonal, and -+diag(Im lambda) beside it
    turned = torch.cat(
        [left * eigenvalues.real + right * eigenvalues.imag, right * eigenvalues.real - left * eigenvalues.imag], 1
    )
    return turned @ T


def _count_slots(A: Tensor) -> int:
    """Number of complex states that the diagonal form of a reduced A needs; a conjugate pair of a real A needs one."""
    return A.shape[0] if A.is_complex() else int((torch.linalg.eigvals(A).imag >= 0).sum())


def _real_maps(modes: Modes, W: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """Maps between `[Re h; Im h]` of the full and of the reduced system, float64 `(2r, 2N)` and `(2N, 2r)`."""
    down, up = modes.from_state @ W.to(modes.from_state.dtype), T.to(modes.to_state.dtype) @ modes.to_state
    if W.is_complex():
        down = torch.cat([down, 1j * down], dim=1)  # acts on [Re h; Im h]
        up = torch.cat([up, -1j * up])  # Re(up h_r) is [Re h; Im h]
    else:
        down, up = down * 2**0.5, up / 2**0.5
    return torch.cat([down.real, down.imag]), torch.cat([up.real, -up.imag], dim=1)
