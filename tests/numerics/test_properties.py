"""Laws of a cut over systems of every awkward kind; the regular ones have theirs in tests/numerics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.numerics import DiagonalSystem, balance, gramians, hankel_singular_values, truncate
from hf_compressm.numerics.balancing import NUMERICAL_RANK, _project
from hf_compressm.numerics.ranks import count_by_tolerance
from tests.numerics.systems import NEAR_UNIT, REALIZATIONS, conditioning, h_infinity


PROPERTY = settings(max_examples=40, deadline=None, database=None, derandomize=True)
SIMILARITY = 1e-10
"""Relative error of the outputs after a change of basis in float64, for systems that are not at the unit circle."""
OF_LARGEST = 1e-8
"""HSVs are square roots of eigenvalues known to eps relative to the largest."""
PER_CONDITION = 200
"""An eigenvalue rounded by a few eps moves a resonance of width `1 - |lambda|` by that multiple of its height."""
KINDS = ("plain", "zero", "tiny", "near unit", "angle zero", "angle pi", "repeated", "unreachable", "unobservable")


@st.composite
def systems(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, silent: bool = True) -> DiagonalSystem:
    """Up to 24 states, some of them of the awkward kinds; now and then without any input or output."""
    order, inputs, outputs = draw(st.integers(1, 24)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.complex128)

    modulus = 0.98 * torch.rand(order, generator=generator, dtype=torch.float64).sqrt()
    angle = 2 * math.pi * torch.rand(order, generator=generator, dtype=torch.float64)
    B, C = normal(order, inputs), normal(outputs, order)
    for state, kind in draw(st.lists(st.tuples(st.integers(0, order - 1), st.sampled_from(kinds)), max_size=8)):
        if kind in ("zero", "tiny", "near unit"):
            modulus[state] = {"zero": 0.0, "tiny": 1e-200, "near unit": NEAR_UNIT}[kind]
        elif kind in ("angle zero", "angle pi"):
            angle[state] = 0.0 if kind == "angle zero" else math.pi
        elif kind == "repeated":
            modulus[state:], angle[state:] = modulus[state].clone(), angle[state].clone()
        elif kind == "unreachable":
            B[state] = 0
        elif kind == "unobservable":
            C[:, state] = 0
    if silent and draw(st.integers(0, 15)) == 0:
        (B if draw(st.booleans()) else C).zero_()
    return DiagonalSystem(torch.polar(modulus, angle), B, C)


FAR_FROM_UNIT = tuple(kind for kind in KINDS if kind != "near unit")
realizations = st.sampled_from(REALIZATIONS)


@PROPERTY
@given(systems(), realizations)
def test_the_spectrum_is_finite_descending_and_whole(system: DiagonalSystem, realization: str) -> None:
    sigma = hankel_singular_values(system, realization)
    assert sigma.shape == (system.order * (2 if realization == "real" else 1),)
    assert bool(torch.isfinite(sigma).all())
    assert bool((sigma >= 0).all())
    assert bool((sigma.diff() <= 0).all())


@PROPERTY
@given(systems(), realizations, st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=5).map(sorted))
def test_ranks_fall_with_the_tolerance_and_none_keeps_everything(
    system: DiagonalSystem, realization: str, tolerances: list[float]
) -> None:
    sigma = hankel_singular_values(system, realization)
    counts = [count_by_tolerance(sigma, tolerance) for tolerance in tolerances]
    assert counts == sorted(counts, reverse=True)
    assert 1 <= counts[-1]
    assert count_by_tolerance(sigma, 0.0) == sigma.numel()


@PROPERTY
@given(systems(FAR_FROM_UNIT, silent=False), realizations)
def test_keeping_every_state_with_an_effect_is_a_similarity(system: DiagonalSystem, realization: str) -> None:
    balancing = balance(system, realization)
    sigma = balancing.hankel_singular_values
    if not float(sigma[0]) > 0:  # every state was made unreachable or unobservable
        return
    states = torch.arange(int((sigma > NUMERICAL_RANK * sigma[0]).sum()))
    cut = _project(balancing, states)
    if cut is None:  # a Jordan block that round-off makes of equal eigenvalues has no diagonal form
        return
    response, found = system.impulse_response(60), cut.system.impulse_response(60)
    torch.testing.assert_close(found, response, rtol=0, atol=SIMILARITY * float(response.abs().max()))


@PROPERTY
@given(systems(), realizations, st.floats(0, 1))
def test_a_cut_is_smaller_stable_and_within_its_bound(system: DiagonalSystem, realization: str, share: float) -> None:
    balancing = balance(system, realization)
    sigma, rank = balancing.hankel_singular_values, max(1, math.ceil(share * system.order))
    if not float(sigma[0]) > 0 and rank < system.order:
        with pytest.raises(ValueError, match="B or C is zero"):
            truncate(balancing, rank)
        return
    cut = truncate(balancing, rank)
    assert 1 <= cut.system.order <= rank
    assert cut.system.is_stable
    assert cut.system.is_finite
    assert cut.kept <= sigma.numel()
    slack = (OF_LARGEST + PER_CONDITION * conditioning(system)) * float(sigma[0])
    assert h_infinity(system - cut.system, points=100) <= cut.error_bound + slack


@PROPERTY
@given(systems(FAR_FROM_UNIT), realizations, st.integers(0, 10**6))
def test_the_unit_of_a_state_does_not_count(system: DiagonalSystem, realization: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponent = 4 * torch.rand(system.order, generator=generator, dtype=torch.float64) - 2
    scale = torch.polar(10**exponent, 6 * torch.rand(system.order, generator=generator, dtype=torch.float64))
    other = DiagonalSystem(system.eigenvalues, scale[:, None] * system.B, system.C / scale)
    one, two = (hankel_singular_values(each, realization) for each in (system, other))
    # Where no state is both reachable and observable, all HSVs are round-off of Gramians that are not.
    norms = [
        torch.linalg.matrix_norm(P, 2) * torch.linalg.matrix_norm(Q, 2) for P, Q in map(gramians, (system, other))
    ]
    torch.testing.assert_close(two, one, rtol=0, atol=10 * OF_LARGEST * float(max(norms)) ** 0.5)


@PROPERTY
@given(systems())
def test_a_state_by_itself_passes_on_no_more_than_there_is(system: DiagonalSystem) -> None:
    balancing = balance(system)
    scores = balancing.state_scores
    assert scores.shape == (system.order,)
    assert bool(torch.isfinite(scores).all())
    assert bool((scores >= 0).all())
    silent = ~(system.B.abs().sum(1) > 0) | ~(system.C.abs().sum(0) > 0)
    assert float(scores[silent].max() if silent.any() else 0) <= 1e-6 * max(float(scores.max()), 1e-300)
