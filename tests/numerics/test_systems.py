import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.numerics import DiagonalSystem
from tests.numerics.systems import ALL, REGULAR, conditioning, random_system


STEPS = 40
ROUND_OFF = 1e-12
"""A few hundred additions of numbers of order ten in float64."""
TAIL = 1e-9
"""What is left of a response of modulus 0.95 per step after `LONG` steps: 0.95^600 is 4e-14, times the gain."""
LONG = 600


@pytest.mark.parametrize("system", ALL.values(), ids=ALL)
def test_impulse_response_is_that_of_the_recurrence(system: DiagonalSystem) -> None:
    state, responses = system.B.clone(), []
    for _ in range(STEPS):
        responses.append((system.C @ state).real)
        state = system.eigenvalues[:, None] * state
    expected = torch.stack(responses)
    assert system.impulse_response(STEPS).dtype == torch.float64
    torch.testing.assert_close(system.impulse_response(STEPS), expected, rtol=0, atol=ROUND_OFF)
    torch.testing.assert_close(system.impulse_response(1), expected[:1], rtol=0, atol=ROUND_OFF)


@pytest.mark.parametrize("name", ["one state", "odd order", "wide", "tall", "real", "zero eigenvalue", "angle zero"])
def test_frequency_response_is_the_sum_of_the_impulse_response(name: str) -> None:
    system = REGULAR[name]
    frequencies = torch.linspace(-math.pi, math.pi, 17, dtype=torch.float64)
    waves = torch.exp(-1j * frequencies[:, None] * torch.arange(LONG))
    expected = torch.einsum("fk,kph->fph", waves, system.impulse_response(LONG).to(waves))
    torch.testing.assert_close(system.frequency_response(frequencies), expected, rtol=TAIL, atol=TAIL)


@pytest.mark.parametrize("system", ALL.values(), ids=ALL)
def test_conjugates_carry_the_same_real_map(system: DiagonalSystem) -> None:
    doubled = system.with_conjugates()
    assert doubled.order == 2 * system.order
    complex_output = torch.einsum("pn,nh->ph", doubled.C, doubled.eigenvalues[:, None] * doubled.B)
    assert float(complex_output.imag.abs().max()) <= ROUND_OFF
    torch.testing.assert_close(doubled.impulse_response(STEPS), system.impulse_response(STEPS), rtol=0, atol=ROUND_OFF)


def test_subtraction_gives_the_difference_of_the_outputs() -> None:
    one, other = random_system(7, 2, 3, seed=1), random_system(4, 2, 3, seed=2)
    difference = one - other
    assert difference.order == 11
    expected = one.impulse_response(STEPS) - other.impulse_response(STEPS)
    torch.testing.assert_close(difference.impulse_response(STEPS), expected, rtol=0, atol=ROUND_OFF)


def test_every_precision_is_brought_to_complex128() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64):
        system = DiagonalSystem(
            torch.full((3,), 0.5, dtype=dtype), torch.ones(3, 2, dtype=dtype), torch.ones(1, 3, dtype=dtype)
        )
        assert {system.eigenvalues.dtype, system.B.dtype, system.C.dtype} == {torch.complex128}
        torch.testing.assert_close(
            system.impulse_response(2)[:, 0, 0], torch.tensor([3.0, 1.5], dtype=torch.float64), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    "shapes", [((3,), (4, 1), (1, 3)), ((3,), (3, 1), (1, 4)), ((3,), (3,), (1, 3)), ((3, 1), (3, 1), (1, 3))]
)
def test_shapes_that_do_not_belong_together_are_refused(shapes: tuple) -> None:
    with pytest.raises(ValueError, match="one N; got") as caught:
        DiagonalSystem(*(torch.zeros(shape) for shape in shapes))
    assert str(shapes[1]) in str(caught.value)


@pytest.mark.parametrize(
    ("modulus", "stable"), [(0.0, True), (1 - 1e-12, True), (1.0, False), (1.5, False), (math.nan, False)]
)
def test_stability_means_modulus_below_one(modulus: float, stable: bool) -> None:
    system = DiagonalSystem(torch.tensor([0.5, modulus]), torch.ones(2, 1), torch.ones(1, 2))
    in_double = torch.tensor([0.5, modulus], dtype=torch.float64)
    assert DiagonalSystem(in_double, system.B, system.C).is_stable is stable


@pytest.mark.parametrize("part", ["eigenvalues", "B", "C"])
@pytest.mark.parametrize("value", [math.nan, math.inf, complex(0, math.nan)])
def test_finite_looks_at_every_entry(part: str, value: complex) -> None:
    system = random_system(4, 2, 3)
    assert system.is_finite
    getattr(system, part).view(-1)[-1] = value
    assert not system.is_finite


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(order=st.integers(1, 20), inputs=st.integers(1, 4), outputs=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_a_system_minus_itself_is_silent(order: int, inputs: int, outputs: int, seed: int) -> None:
    system = random_system(order, inputs, outputs, radius=0.99, seed=seed)
    response = (system - system).frequency_response(torch.linspace(0, math.pi, 9))
    assert float(response.abs().max()) <= ROUND_OFF + 1e3 * conditioning(system)
