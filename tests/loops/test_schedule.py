"""When cuts happen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm import CompreSSMConfig
from hf_compressm.loops.schedule import cut_steps


@pytest.mark.parametrize(
    ("settings", "max_steps", "steps"),
    [
        ({}, 1000, (25, 50, 75, 100)),
        ({"num_cuts": 1}, 1000, (100,)),
        ({"num_cuts": 2, "start": 0.05}, 1000, (75, 100)),
        ({"num_cuts": 2, "start": 10, "end": 20}, 1000, (15, 20)),
        ({"interval": 30}, 1000, (30, 60, 90)),
        ({"interval": 0.02, "start": 0.04}, 1000, (60, 80, 100)),
        ({"interval": 5, "start": 3, "end": 20}, 1000, (8, 13, 18)),
        ({"num_cuts": 3, "end": 1}, 1000, (1,)),
        ({"num_cuts": 4, "end": 2}, 1000, (1, 2)),
        ({"num_cuts": 2, "end": 0.5}, 2, (1,)),
        ({"num_cuts": 1, "end": 1}, 2, (1,)),
        ({"interval": 0.0001, "end": 3}, 100, (1, 2, 3)),
        ({"num_cuts": 2, "end": 100}, 100, (50,)),
        ({"num_cuts": 3, "start": 90, "end": 110}, 100, (97,)),
    ],
)
def test_examples(settings: dict, max_steps: int, steps: tuple[int, ...]) -> None:
    assert cut_steps(CompreSSMConfig(**settings), max_steps) == steps


@pytest.mark.parametrize(
    ("settings", "max_steps", "named"),
    [
        ({}, 0, "max_steps"),
        ({}, -1, "max_steps"),
        ({}, 4, "end"),
        ({"start": 5, "end": 5}, 100, "end"),
        ({"start": 20, "end": 0.1}, 100, "end"),
        ({"start": 100, "end": 200}, 100, "start"),
        ({"interval": 50, "end": 20}, 100, "interval"),
        ({"end": 1, "num_cuts": 1}, 1, "num_cuts"),
        ({"end": 2.5}, 100, "end"),
        ({"start": 1.5, "end": 20}, 100, "start"),
        ({"interval": 2.5, "end": 20}, 100, "interval"),
    ],
)
def test_a_schedule_that_cannot_fire_is_refused_and_named(settings: dict, max_steps: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cut_steps(CompreSSMConfig(**settings), max_steps)


moments = st.one_of(st.integers(1, 300), st.floats(0.001, 0.999))


@given(
    max_steps=st.integers(1, 400),
    start=st.one_of(st.just(0), moments),
    end=moments,
    num_cuts=st.integers(1, 12),
    interval=st.none() | moments,
)
def test_cuts_ascend_and_lie_within_the_run(max_steps, start, end, num_cuts, interval) -> None:
    config = CompreSSMConfig(start=start, end=end, num_cuts=num_cuts, interval=interval)
    first, last = (round(value * max_steps) if value < 1 else value for value in (start, end))
    try:
        steps = cut_steps(config, max_steps)
    except ValueError:
        return
    assert steps == tuple(sorted(set(steps)))
    assert 1 <= steps[0]
    assert first <= steps[0]
    assert steps[-1] < max_steps
    assert steps[-1] <= last
    if interval is None:
        assert len(steps) <= num_cuts
        assert last >= max_steps or steps[-1] == last
