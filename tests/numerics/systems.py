"""One table of diagonal systems that feeds every law, and the dense oracles that the laws compare with."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_compressm.numerics import DiagonalSystem


EPS = torch.finfo(torch.float64).eps
NEAR_UNIT = 1 - 1e-12
REALIZATIONS = ("real", "complex")


def random_system(
    order: int, inputs: int = 1, outputs: int = 1, radius: float = 0.95, seed: int = 0, real: bool = False
) -> DiagonalSystem:
    """Eigenvalues of modulus up to `radius`, the largest exactly there; normal B and C."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    modulus = radius * torch.rand(order, generator=generator, dtype=torch.float64)
    modulus[0] = radius
    if real:
        sign = torch.where(torch.arange(order) % 3 == 2, -1.0, 1.0)
        return DiagonalSystem(modulus * sign, normal(order, inputs), normal(outputs, order))
    angle = 2 * math.pi * torch.rand(order, generator=generator, dtype=torch.float64)
    B, C = torch.complex(normal(order, inputs), normal(order, inputs)), normal(outputs, order)
    return DiagonalSystem(torch.polar(modulus, angle), B, torch.complex(C, normal(outputs, order)))


def lru_ring(order: int, channels: int, seed: int = 0, r_min: float = 0.9, r_max: float = 0.999) -> DiagonalSystem:
    """A linear recurrent unit at initialisation: eigenvalues uniform on a ring, B scaled by `sqrt(1 - |lambda|^2)`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, generator=generator, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(order, generator=generator, dtype=torch.float64)

    modulus = (r_min**2 + (r_max**2 - r_min**2) * uniform()).sqrt()
    B = torch.view_as_complex(normal(order, channels)) / (2 * channels) ** 0.5
    C = torch.view_as_complex(normal(channels, order)) / order**0.5
    return DiagonalSystem(torch.polar(modulus, 2 * math.pi * uniform()), B * (1 - modulus**2).sqrt()[:, None].to(B), C)


def edited(edit: Callable[[Tensor, Tensor, Tensor], None], order: int = 9, seed: int = 5) -> DiagonalSystem:
    """A random system of two inputs and three outputs after `edit` changed eigenvalues, B and C in place."""
    system = random_system(order, inputs=2, outputs=3, seed=seed)
    parts = system.eigenvalues.clone(), system.B.clone(), system.C.clone()
    edit(*parts)
    return DiagonalSystem(*parts)


def _repeated(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    eigenvalues[:4] = eigenvalues[0]


def _zero_eigenvalue(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    eigenvalues[2] = 0


def _all_zero_eigenvalues(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    eigenvalues.zero_()


def _angle_zero(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    eigenvalues[::2] = eigenvalues[::2].abs().to(eigenvalues)


def _all_angle_zero(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    eigenvalues.copy_(eigenvalues.abs())


def _near_unit(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    eigenvalues[0] *= NEAR_UNIT / eigenvalues[0].abs()


def _all_near_unit(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    eigenvalues *= NEAR_UNIT / eigenvalues.abs()


def _unreachable(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    B[3:6] = 0


def _unobservable(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    C[:, 2:4] = 0


def _neither(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    B[3:6] = 0
    C[:, 2:4] = 0


def _no_input(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    B.zero_()


def _no_output(eigenvalues: Tensor, B: Tensor, C: Tensor) -> None:
    C.zero_()


REGULAR: dict[str, DiagonalSystem] = {
    "one state": random_system(1),
    "one state, several inputs and outputs": random_system(1, 3, 2),
    "one real state": random_system(1, real=True),
    "two states": random_system(2, 1, 2),
    "odd order": random_system(13, 2, 2),
    "wide": random_system(7, 5, 1),
    "tall": random_system(7, 1, 5),
    "real": random_system(11, 2, 2, real=True),
    "long memory": random_system(12, 2, 3, radius=0.9999),
    "ring": lru_ring(33, 4),
    "repeated": edited(_repeated),
    "zero eigenvalue": edited(_zero_eigenvalue),
    "all eigenvalues zero": edited(_all_zero_eigenvalues),
    "angle zero": edited(_angle_zero),
    "all angles zero": edited(_all_angle_zero),
    "unreachable": edited(_unreachable),
    "unobservable": edited(_unobservable),
    "unreachable and unobservable": edited(_neither),
}
"""Systems with an output, far enough from the unit circle for an oracle in double precision."""

SILENT = {"no input": edited(_no_input), "no output": edited(_no_output)}
NEAR_UNIT_CIRCLE = {"near unit": edited(_near_unit), "all near unit": edited(_all_near_unit)}
LOUD = REGULAR | NEAR_UNIT_CIRCLE
ALL = LOUD | SILENT


def dense_real(system: DiagonalSystem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B, C of the real map in the coordinates `[Re h; Im h]`, written down independently of the package."""
    a, B, C = (x.numpy() for x in (system.eigenvalues, system.B, system.C))
    A = np.block([[np.diag(a.real), -np.diag(a.imag)], [np.diag(a.imag), np.diag(a.real)]])
    return A, np.vstack([B.real, B.imag]), np.hstack([C.real, -C.imag])


def dense_markov(A: np.ndarray, B: np.ndarray, C: np.ndarray, steps: int) -> np.ndarray:
    """`C A^k B` for k = 0 .. steps-1, `(steps, P, H)`."""
    responses, state = [], B
    for _ in range(steps):
        responses.append(C @ state)
        state = A @ state
    return np.stack(responses)


def conditioning(system: DiagonalSystem) -> float:
    """How far double precision magnifies a rounded eigenvalue: `eps / (1 - |lambda|)` of the slowest state."""
    return EPS / (1 - float(system.eigenvalues.abs().max()))


def frequency_grid(system: DiagonalSystem, points: int = 1000) -> Tensor:
    """Frequencies in [0, pi], even, and refined around every eigenvalue's angle at the width of its resonance."""
    width = (1 - system.eigenvalues.abs())[:, None]
    offsets = torch.tensor([0.0, 0.1, 0.3, 1.0, 3.0], dtype=torch.float64)
    around = system.eigenvalues.angle()[:, None] + width * torch.cat([offsets, -offsets])
    return torch.cat([torch.linspace(0, math.pi, points, dtype=torch.float64), around.flatten()])


def h_infinity(system: DiagonalSystem, points: int = 1000, refine: bool = True) -> float:
    """Lower estimate of the H-infinity norm of the real map: the largest gain on the grid, or on its even part."""
    grid = frequency_grid(system, points)
    response = system.frequency_response(grid if refine else grid[:points])
    return float(torch.linalg.matrix_norm(response, ord=2).max())
