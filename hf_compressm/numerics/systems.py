"""Linear time-invariant systems with a diagonal state matrix, in discrete time.

| symbol | meaning | shape |
|---|---|---|
| `eigenvalues` | diagonal of the state matrix A, complex | `(N,)` |
| B | input matrix, complex | `(N, H)` |
| C | output matrix, complex | `(P, N)` |
| h_k, u_k, y_k | state (complex), input (real), output (real) at step k | `(N,)`, `(H,)`, `(P,)` |
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DiagonalSystem:
    """The recurrence `h_k = diag(eigenvalues) h_{k-1} + B u_k`, `y_k = Re(C h_k)`, held in complex128.

    Args:
        eigenvalues: `(N,)`, real or complex.
        B: `(N, H)`.
        C: `(P, N)`.

    Raises:
        ValueError: if the three shapes do not fit together.
    """

    eigenvalues: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        """Check the shapes and bring every matrix to complex128."""
        shapes = tuple(self.eigenvalues.shape), tuple(self.B.shape), tuple(self.C.shape)
        order = self.eigenvalues.numel()
        if [len(shape) for shape in shapes] != [1, 2, 2] or shapes[1][0] != order or shapes[2][1] != order:
            raise ValueError(
                "DiagonalSystem takes eigenvalues (N,), B (N, H) and C (P, N) with one N; "
                f"got {shapes[0]}, {shapes[1]} and {shapes[2]}."
            )
        for name in ("eigenvalues", "B", "C"):
            object.__setattr__(self, name, getattr(self, name).to(torch.complex128))

    @property
    def order(self) -> int:
        """Number of complex states N."""
        return self.eigenvalues.numel()

    @property
    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return all(bool(torch.isfinite(torch.view_as_real(x)).all()) for x in (self.eigenvalues, self.B, self.C))

    @property
    def is_stable(self) -> bool:
        """Whether every `|eigenvalue| < 1`; NaN counts as unstable."""
        return bool((self.eigenvalues.abs() < 1).all())

    def with_conjugates(self) -> "DiagonalSystem":
        """The same real input-output map as a system of order 2N that no longer needs `Re(.)`.

        With `[h; conj h]` as state, `Re(C h) = [C, conj C]/2 [h; conj h]`.
        """
        return DiagonalSystem(
            torch.cat([self.eigenvalues, self.eigenvalues.conj()]),
            torch.cat([self.B, self.B.conj()]),
            torch.cat([self.C, self.C.conj()], dim=1) / 2,
        )

    def __sub__(self, other: "DiagonalSystem") -> "DiagonalSystem":
        """The error system: its output is this system's output minus the other's."""
        return DiagonalSystem(
            torch.cat([self.eigenvalues, other.eigenvalues]),
            torch.cat([self.B, other.B]),
            torch.cat([self.C, -other.C], dim=1),
        )

    def impulse_response(self, steps: int) -> Tensor:
        """Markov parameters `Re(C diag(eigenvalues)^k B)` for k = 0 .. steps-1, float64 `(steps, P, H)`."""
        powers = torch.ones(steps, self.order, dtype=torch.complex128, device=self.B.device)
        if steps > 1:
            powers[1:] = torch.cumprod(self.eigenvalues.expand(steps - 1, -1), dim=0)
        return torch.einsum("pn,kn,nh->kph", self.C, powers, self.B).real

    def frequency_response(self, frequencies: Tensor) -> Tensor:
        """Transfer function of the real map, `sum_k Re(C diag(eigenvalues)^k B) exp(-i omega k)`.

        Args:
            frequencies: `(F,)`, angular frequency omega in radians per step.

        Returns:
            complex128 `(F, P, H)`.
        """
        real_map = self.with_conjugates()
        delay = torch.exp(-1j * frequencies.to(torch.float64))  # (F,)
        resolvent = 1 / (1 - delay[:, None] * real_map.eigenvalues)  # (F, 2N)
        return torch.einsum("pn,fn,nh->fph", real_map.C, resolvent, real_map.B)
