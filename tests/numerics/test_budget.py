import math
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.numerics.budget import cheapest


PROPERTY = settings(max_examples=150, deadline=None, database=None, derandomize=True)
ROUND_OFF = 1e-9


def offers_of(costs: list[float]) -> dict[int, tuple[float, float]]:
    """Offers of weight 0, 1, 2, ..., named by their weight."""
    return {weight: (float(weight), cost) for weight, cost in enumerate(costs)}


falling = st.lists(st.floats(0, 10), min_size=1, max_size=4).map(
    lambda drops: [sum(sorted(drops, reverse=True)[k:]) for k in range(len(drops) + 1)]
)
"""Convex costs, the last one 0."""
any_costs = st.lists(st.floats(0, 10), min_size=1, max_size=4)


def best(offers: list[dict[int, tuple[float, float]]], budget: float) -> float:
    """The least cost within a budget, of all combinations."""
    fitting = (
        sum(parts[name][1] for parts, name in zip(offers, names, strict=True))
        for names in product(*offers)
        if sum(parts[name][0] for parts, name in zip(offers, names, strict=True)) <= budget
    )
    return min(fitting, default=math.inf)


@PROPERTY
@given(st.lists(falling, min_size=1, max_size=4), st.integers(0, 12))
def test_convex_offers_of_even_steps_are_shared_out_optimally(costs: list[list[float]], budget: int) -> None:
    offers = [offers_of(each) for each in costs]
    chosen = cheapest(offers, budget)
    cost = sum(parts[name][1] for parts, name in zip(offers, chosen, strict=True))
    assert cost <= best(offers, budget) + ROUND_OFF


@PROPERTY
@given(st.lists(any_costs, min_size=1, max_size=4), st.floats(0, 12))
def test_a_budget_is_kept_and_nothing_better_is_left_beside_it(costs: list[list[float]], budget: float) -> None:
    offers = [offers_of(each) for each in costs]
    chosen = cheapest(offers, budget)
    weight = sum(parts[name][0] for parts, name in zip(offers, chosen, strict=True))
    assert weight <= budget
    for parts, name in zip(offers, chosen, strict=True):
        left = budget - weight + parts[name][0]
        assert parts[name][1] <= min(cost for size, cost in parts.values() if parts[name][0] <= size <= left)


def test_a_dear_party_keeps_what_a_cheap_one_gives_up() -> None:
    dear, cheap = {1: (1.0, 9.0), 2: (2.0, 4.0), 4: (4.0, 0.0)}, {1: (1.0, 0.3), 2: (2.0, 0.1), 4: (4.0, 0.0)}
    assert cheapest([dear, cheap], 5) == [4, 1]
    assert cheapest([dear, cheap], 8) == [4, 4]


def test_the_lightest_offers_are_taken_where_no_budget_suffices() -> None:
    assert cheapest([{3: (3.0, 1.0), 5: (5.0, 0.0)}, {2: (2.0, 0.0)}], 1) == [3, 2]
