"""Sharing out a budget: one offer for each of several parties, so that all together cost least."""

from collections.abc import Mapping, Sequence


def cheapest(offers: Sequence[Mapping[int, tuple[float, float]]], budget: float) -> list[int]:
    """Choose one offer for each party, whose weights together stay within a budget if they can.

    From the heaviest offers on, the step that costs least for what it saves is taken until the budget is met, along
    the lower convex hull of every party's offers; this is optimal for budgets that are met exactly. What is then left
    of the budget is given back where it helps most.

    Args:
        offers: of every party, weight and cost of what it may choose, by a number that names it.
        budget: the largest sum of weights; where the lightest offers are too heavy, these are taken.

    Returns:
        The number of the offer that every party gets.
    """
    hulls = [_hull(each) for each in offers]
    places = [0] * len(hulls)
    weight = sum(offers[i][hull[0]][0] for i, hull in enumerate(hulls))
    while weight > budget:
        steps = [
            (_slope(offers[i][hull[place]], offers[i][hull[place + 1]]), i)
            for i, (hull, place) in enumerate(zip(hulls, places, strict=True))
            if place + 1 < len(hull)
        ]
        if not steps:
            break
        _, i = min(steps)
        weight += offers[i][hulls[i][places[i] + 1]][0] - offers[i][hulls[i][places[i]]][0]
        places[i] += 1
    chosen = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    return _filled(offers, chosen, budget - weight)


def _filled(offers: Sequence[Mapping[int, tuple[float, float]]], chosen: list[int], left: float) -> list[int]:
    """Choices that use what is left of the budget, the greatest gain first."""
    while True:
        gains = [
            (offers[i][present][1] - cost, weight - offers[i][present][0], i, name)
            for i, present in enumerate(chosen)
            for name, (weight, cost) in offers[i].items()
            if 0 < weight - offers[i][present][0] <= left and cost < offers[i][present][1]
        ]
        if not gains:
            return chosen
        _, more, i, name = max(gains, key=lambda gain: (gain[0], -gain[1]))
        chosen[i], left = name, left - more


def _hull(offers: Mapping[int, tuple[float, float]]) -> list[int]:
    """The offers on the lower convex hull of weight and cost, the heaviest first."""
    hull: list[int] = []
    for name in sorted(offers, key=lambda each: (-offers[each][0], offers[each][1])):
        if hull and offers[name][0] == offers[hull[-1]][0]:
            continue
        while len(hull) > 1 and _slope(offers[hull[-2]], offers[hull[-1]]) >= _slope(offers[hull[-1]], offers[name]):
            hull.pop()
        if len(hull) == 1 and offers[name][1] <= offers[hull[0]][1]:
            hull.pop()
        hull.append(name)
    return hull


def _slope(heavy: tuple[float, float], light: tuple[float, float]) -> float:
    """What a step from one offer to a lighter one costs for each unit of weight."""
    return (light[1] - heavy[1]) / (heavy[0] - light[0])
