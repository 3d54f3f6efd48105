import pytest
import torch
from torch import Tensor

from hf_compressm.numerics.shared_projection import shared_directions, shared_projection, shared_projection_loss


SAMPLES = 1000
SEEDS = 4
ROUND_OFF = 1e-10


def moments(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    factors = factors * torch.logspace(0, -1, size, dtype=torch.float64)
    return factors[0] @ factors[0].mT, factors[1] @ factors[1].mT


def random_projections(count: int, rank: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(count, size, rank, generator=generator, dtype=torch.float64)).Q.mT


def best_of(Q: Tensor, K: Tensor, projections: Tensor) -> float:
    return min(shared_projection_loss(Q, K, U) for U in projections)


def test_the_loss_is_that_of_the_products() -> None:
    """Of Gaussian queries and keys, drawn."""
    Q, K = moments(5)
    U = random_projections(1, 2, 5)[0]
    generator = torch.Generator().manual_seed(2)
    draws = torch.randn(3, 200_000, 5, generator=generator, dtype=torch.float64)
    q = draws[0] @ torch.linalg.cholesky(Q).mT
    k, other = (draw @ torch.linalg.cholesky(K).mT for draw in draws[1:])
    dropped = torch.eye(5, dtype=torch.float64) - U.mT @ U
    expected = sum(
        ((left @ dropped) * k).sum(-1).square().mean() / (left * k).sum(-1).square().mean() for left in (q, other)
    )
    assert shared_projection_loss(Q, K, U) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (3, 1), (3, 2), (4, 2)])
def test_few_of_many_drawn_projections_of_a_small_space_are_better(size: int, rank: int) -> None:
    """The search ends in a local minimum, and begins near the lowest."""
    better = 0
    for seed in range(SEEDS):
        Q, K = moments(size, seed)
        loss = shared_projection_loss(Q, K, shared_projection(Q, K, shared_directions(Q, K)[:rank]))
        drawn = random_projections(SAMPLES, rank, size)
        better += sum(shared_projection_loss(Q, K, U) < 0.999 * loss for U in drawn)
    assert better < SEEDS * SAMPLES / 100


@pytest.mark.parametrize(("size", "rank"), [(16, 4), (32, 8), (32, 31)])
def test_the_search_improves_on_its_start_and_stays_orthonormal(size: int, rank: int) -> None:
    Q, K = moments(size)
    start = shared_directions(Q, K)[:rank]
    found = shared_projection(Q, K, start)
    torch.testing.assert_close(found @ found.mT, torch.eye(rank, dtype=torch.float64), rtol=0, atol=ROUND_OFF)
    loss = shared_projection_loss(Q, K, found)
    assert loss < shared_projection_loss(Q, K, start) < best_of(Q, K, random_projections(50, rank, size))


def test_signals_of_low_rank_lose_nothing() -> None:
    basis = random_projections(1, 3, 8)[0]
    Q, K = (basis.mT @ moment @ basis for moment in moments(3))
    assert shared_projection_loss(Q, K, shared_projection(Q, K, shared_directions(Q, K)[:3])) < ROUND_OFF


def test_units_and_coordinates_do_not_matter() -> None:
    Q, K = moments(6)
    rotation = random_projections(1, 6, 6)[0]
    turned = [rotation @ moment @ rotation.mT for moment in (100 * Q, 0.01 * K)]
    losses = [
        shared_projection_loss(*pair, shared_projection(*pair, shared_directions(*pair)[:3]))
        for pair in ((Q, K), turned)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("silent", ["Q", "K", "both"])
def test_silence_gives_a_projection_too(silent: str) -> None:
    Q, K = moments(4)
    Q, K = Q * (silent == "K"), K * (silent == "Q")
    found = shared_projection(Q, K, shared_directions(Q, K)[:2])
    torch.testing.assert_close(found @ found.mT, torch.eye(2, dtype=torch.float64), rtol=0, atol=ROUND_OFF)


def test_all_directions_lose_nothing_and_none_loses_all() -> None:
    Q, K = moments(4)
    assert shared_projection_loss(Q, K, shared_directions(Q, K)) < ROUND_OFF
    assert shared_projection_loss(Q, K, torch.zeros(0, 4)) == pytest.approx(2)
