"""Balanced projection of measured covariances: a projection, optimal, and safe on rank-deficient data."""

import pytest
import torch
from torch import Tensor

from hf_compressm.numerics.interpolation import empirical_hankel_singular_values, pivoted_selection
from hf_compressm.numerics.projection import balanced_projection, projection_errors


EXACT = 1e-9
"""Round-off of eigendecompositions of well-conditioned float64 matrices, relative."""


def covariances(size: int, rank: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return factors[0] @ factors[0].T, factors[1] @ factors[1].T


def lost(P: Tensor, Q: Tensor, W: Tensor, V: Tensor) -> float:
    defect = torch.eye(len(P), dtype=P.dtype) - V @ W
    return max(0.0, float((Q @ defect @ P @ defect.T).trace() / (Q @ P).trace())) ** 0.5


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (5, 2), (12, 11), (16, 16)])
def test_it_is_a_projection_that_loses_the_tail_of_the_spectrum(size: int, kept: int) -> None:
    P, Q = covariances(size)
    W, V = balanced_projection(P, Q, torch.arange(kept))
    assert torch.allclose(W @ V, torch.eye(kept, dtype=torch.float64), atol=EXACT)
    assert torch.allclose(W.norm(dim=1), torch.ones(kept, dtype=torch.float64), atol=EXACT)
    errors = projection_errors(empirical_hankel_singular_values(P, Q))
    assert errors.shape == (size + 1,)
    assert lost(P, Q, W, V) == pytest.approx(float(errors[kept]), abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_no_selection_and_no_other_projection_loses_less(seed: int) -> None:
    P, Q = covariances(10, seed=seed)
    W, V = balanced_projection(P, Q, torch.arange(4))
    least = lost(P, Q, W, V)
    assert least <= float(pivoted_selection(P, Q)[1][4]) + EXACT
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(10, 4, generator=generator, dtype=torch.float64))[0]
        assert least <= lost(P, Q, other.T, other) + EXACT


def test_states_without_a_share_are_read_out_with_zeros() -> None:
    P, Q = covariances(8, rank=3)
    W, V = balanced_projection(P, Q, torch.arange(6))
    assert torch.isfinite(W).all()
    assert (V[:, 3:] == 0).all()
    assert torch.allclose(W.norm(dim=1), torch.ones(6, dtype=torch.float64), atol=EXACT)
    assert lost(P, Q, W, V) < 1e-6


def test_no_output_at_all_is_finite() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    W, V = balanced_projection(zero, zero, torch.arange(2))
    assert torch.isfinite(W).all()
    assert (V == 0).all()
