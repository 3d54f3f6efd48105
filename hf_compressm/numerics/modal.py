"""From a dense reduced system back to the diagonal form of a `DiagonalSystem`.

| symbol | meaning | shape |
|---|---|---|
| A, B, C | reduced system, real or complex, discrete time | `(m, m)`, `(m, H)`, `(P, m)` |
| V | eigenvectors of A, columns of unit length | `(m, m)` |
| slot | one stored complex state; a conjugate pair of a real system needs one, a real eigenvalue one of its own | |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compressm.numerics.systems import DiagonalSystem


MAX_EIGENVECTOR_CONDITION = 1e7
"""Beyond this (in Frobenius norms) float32 parameters cannot hold the modal form: A is close to a Jordan block."""


@dataclass(frozen=True, eq=False)
class Modes:
    """Modal form of a reduced system.

    Attributes:
        system: the diagonal system, one state per slot.
        from_state: complex `(slots, m)`, slot states from the reduced state: `h = from_state x`.
        to_state: complex `(m, slots)`: `x = to_state h` for a complex system, `x = Re(to_state h)` for a real one.
    """

    system: DiagonalSystem
    from_state: Tensor
    to_state: Tensor


def modal_form(A: Tensor, B: Tensor, C: Tensor, gain_ratio: float = 1.0) -> Modes | None:
    """Diagonalise a reduced system; of each conjugate pair of a real one only the upper half is stored.

    Args:
        A: `(m, m)`, float64 (real map, output `C x`) or complex128 (output `Re(C x)`).
        B: `(m, H)`.
        C: `(P, m)`.
        gain_ratio: value to which `|B_i| / |C_i|` of each slot is scaled; the outputs do not depend on it.

    Returns:
        The modes, or None if A is too close to a defective matrix to be diagonalised in float32.
    """
    if not bool(torch.isfinite(torch.view_as_real(A) if A.is_complex() else A).all()):
        return None
    eigenvalues, V = torch.linalg.eig(A)
    inverse, failed = torch.linalg.inv_ex(V)
    condition = float(torch.linalg.matrix_norm(V) * torch.linalg.matrix_norm(inverse))  # Frobenius: no SVD
    if bool(failed) or not condition <= MAX_EIGENVECTOR_CONDITION:
        return None
    if A.is_complex():
        weight = torch.ones_like(eigenvalues)
    else:
        stored = eigenvalues.imag >= 0
        eigenvalues, V, inverse = eigenvalues[stored], V[:, stored], inverse[stored]
        weight = torch.where(eigenvalues.imag > 0, 2.0, 1.0).to(eigenvalues.dtype)
    input_gain = (inverse @ B.to(inverse.dtype)).norm(dim=1)
    output_gain = (C.to(V.dtype) @ (V * weight)).norm(dim=0)
    scale = _scale(input_gain, output_gain, gain_ratio)
    from_state, to_state = scale[:, None] * inverse, V * (weight / scale)
    system = DiagonalSystem(eigenvalues, from_state @ B.to(V.dtype), C.to(V.dtype) @ to_state)
    return Modes(system, from_state, to_state)


def gain_ratio(system: DiagonalSystem) -> float:
    """Geometric mean over the states of `|B_i| / |C_i|`; states without input or output do not count."""
    input_gain, output_gain = system.B.norm(dim=1), system.C.norm(dim=0)
    used = (input_gain > 0) & (output_gain > 0)
    if not bool(used.any()):
        return 1.0
    return float(torch.exp((input_gain[used].log() - output_gain[used].log()).mean()))


def _scale(input_gain: Tensor, output_gain: Tensor, ratio: float) -> Tensor:
    """Factor per slot that brings `|B_i| / |C_i|` to `ratio`; one for a slot without input or output."""
    used = (input_gain > 0) & (output_gain > 0)
    quotient = torch.where(used, ratio * output_gain / torch.where(used, input_gain, 1.0), 1.0)
    return quotient.sqrt()
