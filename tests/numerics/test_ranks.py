import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compressm.numerics.ranks import (
    allowed_sizes,
    count_by_error,
    count_by_tolerance,
    passes_gate,
    round_size,
    tail_sums,
)


PROPERTY = settings(max_examples=200, deadline=None, database=None, derandomize=True)
spectra = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)
shares = st.floats(0, 1, exclude_max=True)
ROUND_OFF = 1e-9
"""Share of the energy that the two orders of summation in test and package may disagree by."""


def test_tail_sums_are_the_discarded_energy() -> None:
    sums = tail_sums(torch.tensor([4.0, 2.0, 1.0]))
    assert sums.tolist() == [7.0, 3.0, 1.0, 0.0]
    assert sums.dtype == torch.float64


def test_a_tail_far_below_the_head_is_not_lost() -> None:
    # Summed from the largest down, 1 + 1e-17 would be 1.
    assert tail_sums(torch.tensor([1.0, 1e-17, 1e-18], dtype=torch.float64))[1].item() == pytest.approx(1.1e-17)


@pytest.mark.parametrize(
    ("tolerance", "count"), [(0.0, 4), (0.05, 4), (0.1, 3), (0.29, 3), (0.3, 2), (0.6, 1), (0.99, 1)]
)
def test_count_by_tolerance_by_hand(tolerance: float, count: int) -> None:
    assert count_by_tolerance(torch.tensor([4.0, 3.0, 2.0, 1.0]), tolerance) == count


@pytest.mark.parametrize(
    "sigma",
    [
        [math.nan] * 5,
        [3.0, 2.0, math.nan, 1.0, 0.5],
        [math.inf, 2.0, 1.0, 0.5, 0.1],
        [0.0] * 5,
    ],
    ids=["all nan", "one nan", "infinite", "no energy"],
)
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.999])
def test_a_spectrum_without_meaning_shrinks_nothing(sigma: list[float], tolerance: float) -> None:
    assert count_by_tolerance(torch.tensor(sigma), tolerance) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerance_zero_keeps_everything_in_spite_of_round_off(dtype: torch.dtype) -> None:
    # The cumulative share of such a spectrum reaches one only up to round-off, or too early.
    for sigma in (torch.full((1000,), 0.1, dtype=dtype), torch.logspace(0, -30, 1000, dtype=dtype)):
        assert count_by_tolerance(sigma, 0.0) == 1000
        assert count_by_tolerance(sigma, 1e-300) == 1000
        assert count_by_tolerance(sigma, math.nan) == 1000


@pytest.mark.parametrize("tolerance", [1e-17, 1e-16, 1e-12])
def test_a_tiny_tolerance_discards_next_to_nothing(tolerance: float) -> None:
    # In the reference a share that round-off keeps from reaching its threshold leaves one state.
    assert count_by_tolerance(torch.full((1000,), 0.1, dtype=torch.float64), tolerance) == 1000


@PROPERTY
@given(sigma=spectra, tolerance=shares)
def test_the_tolerance_is_kept_and_no_state_is_wasted(sigma: Tensor, tolerance: float) -> None:
    count, total = count_by_tolerance(sigma, tolerance), math.fsum(sigma.tolist())
    assert 1 <= count <= sigma.numel()
    assert math.fsum(sigma[count:].tolist()) <= (tolerance + ROUND_OFF) * total
    if 1 < count and 0 < tolerance and 0 < total:
        assert math.fsum(sigma[count - 1 :].tolist()) >= (tolerance - ROUND_OFF) * total


@PROPERTY
@given(sigma=spectra, one=shares, other=shares)
def test_count_falls_with_the_tolerance(sigma: Tensor, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert count_by_tolerance(sigma, low) >= count_by_tolerance(sigma, high)


@PROPERTY
@given(sigma=spectra, exponent=st.integers(-20, 20), tolerance=shares)
def test_count_does_not_depend_on_the_unit(sigma: Tensor, exponent: int, tolerance: float) -> None:
    sigma = torch.where(sigma < 1e-200, 0.0, sigma)  # a denormal number would lose digits
    assert count_by_tolerance(sigma, tolerance) == count_by_tolerance(sigma * 2.0**exponent, tolerance)


@pytest.mark.parametrize(("max_error", "count"), [(0.0, 3), (0.1, 3), (0.2, 2), (0.5, 1), (2.0, 1)])
def test_count_by_error_by_hand(max_error: float, count: int) -> None:
    assert count_by_error(torch.tensor([1.0, 0.5, 0.2, 0.0]), max_error) == count


@pytest.mark.parametrize("errors", [[math.nan] * 4, [1.0, math.nan, math.nan, math.nan], [0.0] * 4])
def test_errors_without_meaning_shrink_nothing(errors: list[float]) -> None:
    assert count_by_error(torch.tensor(errors), 0.5) == 3


def test_a_nan_limit_shrinks_nothing() -> None:
    assert count_by_error(torch.tensor([1.0, 0.5, 0.2, 0.0]), math.nan) == 3


def test_an_error_that_never_gets_small_keeps_everything() -> None:
    assert count_by_error(torch.tensor([1.0, 0.9, 0.8, 0.7]), 0.5) == 3


@PROPERTY
@given(sigma=spectra, one=st.floats(0, 1e7), other=st.floats(0, 1e7))
def test_count_falls_with_the_largest_error(sigma: Tensor, one: float, other: float) -> None:
    errors, (low, high) = 2 * tail_sums(sigma), sorted((one, other))
    assert count_by_error(errors, low) >= count_by_error(errors, high)
    count = count_by_error(errors, high)
    assert 1 <= count <= sigma.numel()
    assert float(errors[count]) <= high
    if count > 1 and float(errors[0]) > 0:
        assert float(errors[count - 1]) > high


sizes = st.integers(1, 600)


lists = st.none() | st.lists(st.integers(1, 600), min_size=1, max_size=8)


@PROPERTY
@given(size=sizes, multiple=st.integers(1, 64), minimum=st.integers(1, 64), listed=lists)
def test_all_sizes_that_fit_every_condition_are_allowed_and_no_others(
    size: int, multiple: int, minimum: int, listed: list[int] | None
) -> None:
    fitting = {each for each in range(1, size) if each % multiple == 0 and each >= minimum}
    expected = fitting if listed is None else fitting & set(listed)
    assert allowed_sizes(size, multiple, minimum, listed) == [*sorted(expected), size]


@PROPERTY
@given(wanted=st.floats(-5, 700), size=sizes, multiple=st.integers(1, 64), listed=lists)
def test_a_rounded_size_is_the_smallest_allowed_one_that_is_enough(
    wanted: float, size: int, multiple: int, listed: list[int] | None
) -> None:
    allowed = allowed_sizes(size, multiple, 1, listed)
    rounded = round_size(wanted, allowed)
    assert rounded in allowed
    assert rounded >= min(wanted - ROUND_OFF, size)
    assert all(smaller < wanted for smaller in allowed if smaller < rounded)


@PROPERTY
@given(one=st.floats(0, 700), other=st.floats(0, 700), size=sizes, multiple=st.integers(1, 64), listed=lists)
def test_a_rounded_size_grows_with_the_wanted_one(
    one: float, other: float, size: int, multiple: int, listed: list[int] | None
) -> None:
    low, high = sorted((one, other))
    allowed = allowed_sizes(size, multiple, 1, listed)
    assert round_size(low, allowed) <= round_size(high, allowed)


def test_a_share_of_the_size_is_not_rounded_up_by_round_off() -> None:
    assert 0.1 * 3 * 10 > 3
    assert round_size(0.1 * 3 * 10, allowed_sizes(30)) == 3


@pytest.mark.parametrize(
    ("size", "new_size", "min_reduction", "passes"),
    [
        (100, 95, 0.05, True),
        (100, 96, 0.05, False),
        (20, 19, 0.05, True),
        (19, 18, 0.05, True),
        (1, 1, 0.0, False),
        (10, 10, 0.0, False),
        (10, 9, 0.0, True),
        (10, 11, 0.0, False),
    ],
)
def test_the_gate_asks_for_a_share_of_the_states(size: int, new_size: int, min_reduction: float, passes: bool) -> None:
    assert passes_gate(size, new_size, min_reduction) is passes
