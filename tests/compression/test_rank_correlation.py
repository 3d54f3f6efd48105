"""Spearman's rank correlation against scipy's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_compressm.compression.stability import rank_correlation


PROPERTY = settings(max_examples=100, deadline=None, database=None, derandomize=True)
ROUND_OFF = 1e-12
pairs = st.lists(st.tuples(st.integers(-9, 9), st.floats(-1e6, 1e6)), min_size=2, max_size=40)
"""Whole numbers on one side, so that there are ties."""


def column(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@PROPERTY
@given(pairs)
def test_it_is_that_of_scipy(values: list[tuple[int, float]]) -> None:
    one, other = map(list, zip(*values, strict=True))
    found = rank_correlation(column(one), column(other))
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(one, other).statistic, abs=ROUND_OFF)
    assert -1 - ROUND_OFF <= found <= 1 + ROUND_OFF
    assert found == pytest.approx(rank_correlation(column(other), column(one)), abs=ROUND_OFF)


@PROPERTY
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=40, unique=True))
def test_only_the_order_counts(values: list[int]) -> None:
    scores = column(values)
    assert rank_correlation(scores, (scores / 1000).exp()) == pytest.approx(1, abs=ROUND_OFF)
    assert rank_correlation(scores, -scores) == pytest.approx(-1, abs=ROUND_OFF)


def test_ties_share_a_rank() -> None:
    assert rank_correlation(column([1, 1, 2]), column([1, 2, 3])) == pytest.approx(math.sqrt(3) / 2)


def test_one_state_is_in_order() -> None:
    assert rank_correlation(column([3.0]), column([-1.0])) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_rank_nothing(value: float) -> None:
    scores = column([1.0, 2.0, 3.0])
    assert rank_correlation(scores, column([1.0, value, 3.0])) == 0.0
    assert rank_correlation(column([value, 2.0, 3.0]), scores) == 0.0


def test_equal_scores_rank_nothing() -> None:
    assert rank_correlation(column([2.0, 2.0]), column([1.0, 2.0])) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_are_taken(dtype: torch.dtype) -> None:
    scores = torch.tensor([1.0, 4.0, 2.0], dtype=dtype)
    assert rank_correlation(scores, scores) == pytest.approx(1)
