import pytest
import torch
from torch import Tensor

from hf_compressm.numerics import DiagonalSystem, gramians, hankel_singular_values
from hf_compressm.numerics.surrogate import (
    surrogate_gramians,
    surrogate_hankel_singular_values,
    surrogate_losses,
    surrogate_scores,
)


OF_LARGEST = 1e-8
"""HSVs are square roots of eigenvalues known to eps relative to the largest."""


def averages(channels: int, states: int, largest: float = 0.99) -> tuple[Tensor, Tensor, Tensor]:
    a = largest * torch.rand(channels, states, dtype=torch.float64)
    b = torch.randn(channels, states, dtype=torch.float64)
    return a, b, torch.randn(states, dtype=torch.float64)


def covariances(channels: int, states: int) -> tuple[Tensor, Tensor]:
    X, Y = torch.randn(2, channels, states, states + 1, dtype=torch.float64)
    return X @ X.mT, Y @ Y.mT


def by_channel(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    systems = [DiagonalSystem(a[d], b[d][:, None], c[None]) for d in range(a.shape[0])]
    return torch.stack([hankel_singular_values(system, "complex") for system in systems]).sum(dim=0)


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (1, 5), (6, 1), (5, 16)])
def test_spectrum_is_the_sum_over_the_channels(channels: int, states: int) -> None:
    a, b, c = averages(channels, states)
    found, expected = surrogate_hankel_singular_values(*surrogate_gramians(a, b, c)), by_channel(a, b, c)
    assert found.dtype == torch.float64
    assert bool((found.diff() <= 0).all())
    torch.testing.assert_close(found, expected, rtol=0, atol=OF_LARGEST * float(expected[0]))


def test_averages_in_single_precision_are_widened_before_they_cancel() -> None:
    a, b, c = averages(3, 4)
    a[0, 0] = 1 - 1e-6
    single = a.float(), b.float(), c.float()
    widened = by_channel(*(x.double() for x in single))
    found = surrogate_hankel_singular_values(*surrogate_gramians(*single))
    torch.testing.assert_close(found, widened, rtol=0, atol=OF_LARGEST * float(widened[0]))


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (4, 7)])
def test_gramians_are_those_of_every_channel(channels: int, states: int) -> None:
    a, b, c = averages(channels, states)
    P, Q = surrogate_gramians(a, b, c)
    for d in range(channels):
        expected = gramians(DiagonalSystem(a[d], b[d][:, None], c[None]), "complex")
        torch.testing.assert_close(P[d], expected[0].real)
        torch.testing.assert_close(Q[d], expected[1].real)


def test_the_score_of_a_state_is_its_own_spectrum() -> None:
    P, Q = surrogate_gramians(*averages(4, 7))
    expected = [float(surrogate_hankel_singular_values(P[:, [i]][:, :, [i]], Q[:, [i]][:, :, [i]])) for i in range(7)]
    assert surrogate_scores(P, Q).tolist() == pytest.approx(expected)


def test_states_without_input_or_output_score_nothing() -> None:
    P, Q = covariances(4, 5)
    P[:, 1], P[:, :, 1], Q[:, 3], Q[:, :, 3] = 0, 0, 0, 0
    scores = surrogate_scores(P, Q)
    assert [i for i in range(5) if scores[i] == 0] == [1, 3]


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (1, 6), (4, 1), (3, 7)])
def test_losses_are_the_energy_of_the_dropped_states(channels: int, states: int) -> None:
    P, Q = covariances(channels, states)
    order = torch.randperm(states)
    losses = surrogate_losses(P, Q, order)
    for count in range(states + 1):
        dropped = torch.ones(states, dtype=torch.float64)
        dropped[order[:count]] = 0
        D = torch.diag(dropped)
        expected = sum(float((Q[d] @ D @ P[d] @ D).trace()) for d in range(channels))
        assert float(losses[count]) == pytest.approx(expected)
    assert losses[-1] == 0


def test_inputs_are_not_changed() -> None:
    inputs, (P, Q) = averages(3, 4), covariances(3, 4)
    before = [x.clone() for x in (*inputs, P, Q)]
    surrogate_gramians(*inputs)
    surrogate_hankel_singular_values(P, Q)
    surrogate_losses(P, Q, surrogate_scores(P, Q).argsort())
    assert all(map(torch.equal, before, (*inputs, P, Q)))
