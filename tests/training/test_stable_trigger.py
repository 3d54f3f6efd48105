"""Cuts that wait until the ranking of the states is stable."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig
from hf_compressm.loops.schedule import StableRanking
from tests.family_table import LRU, MAMBA, MAMBA2, S5, Family, family_id, same
from tests.trainers import callback_of, trainer_of


STABLE = {"fraction": 0.5, "trigger": "stable", "end": 10, "interval": 1, "num_cuts": 1, "stability_window": 2}


class Rankings:
    """A layer whose states swap places until a step, and then keep them."""

    def __init__(self, *layers: list[float]) -> None:
        self.values = list(layers)

    def __call__(self) -> dict[str, list[list[float]]]:
        return {"layer": [self.values.pop(0)]}


def trigger(values: list[list[float]], **settings: Any) -> StableRanking:
    return StableRanking(CompreSSMConfig(**{**STABLE, **settings}), 20, Rankings(*values))


def due(found: StableRanking, steps: range = range(1, 11)) -> list[int]:
    steps_due = []
    for step in steps:
        found.observe(step)
        if found.is_due(step):
            steps_due.append(step)
    return steps_due


UP, DOWN = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]


def test_a_cut_is_due_when_enough_successive_rankings_agree() -> None:
    assert due(trigger([UP, DOWN, UP, UP, UP, *[UP] * 9])) == [5]


def test_one_ranking_that_moves_starts_the_count_again() -> None:
    assert due(trigger([UP, UP, DOWN, DOWN, DOWN, *[DOWN] * 9])) == [5]


def test_a_ranking_that_never_settles_releases_nothing_and_says_how_near_it_came() -> None:
    found = trigger([UP, DOWN] * 9)
    assert due(found) == []
    assert "-1.000, -1.000" in found.describe()


def test_after_a_cut_the_ranking_has_to_settle_anew() -> None:
    short = [1.0, 2.0]
    values = [UP, UP, UP, short, short, short, *[short] * 9]
    assert due(trigger(values, num_cuts=2)) == [3, 6]
    assert due(trigger(values, num_cuts=1)) == [3]


def test_the_state_of_the_trigger_goes_through_a_checkpoint() -> None:
    whole = trigger([UP, DOWN, UP, UP, UP, *[UP] * 9])
    first = trigger([UP, DOWN, UP, UP])
    for step in range(1, 5):
        first.observe(step)
    second = trigger([UP, *[UP] * 9])
    second.restore(first.state())
    assert due(whole) == due(second, range(5, 11)) == [5]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"end": 2, "stability_window": 3}, r"2 measurement\(s\).*needs 4"),
        ({"interval": 9}, r"2 measurement\(s\).*interval"),
        ({"start": 12}, "No cut can happen"),
    ],
)
def test_a_window_that_cannot_be_filled_is_refused(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        trigger([], **settings)


def test_without_an_interval_a_ranking_is_measured_twenty_times() -> None:
    seen: list[int] = []

    def measure() -> dict[str, list[list[float]]]:
        seen.append(1)
        return {"layer": [UP if len(seen) % 2 else DOWN]}

    found = StableRanking(CompreSSMConfig(fraction=0.5, trigger="stable", end=0.5), 1000, measure)
    assert due(found, range(1, 1001)) == []
    assert len(seen) == 20


@pytest.mark.parametrize("family", [LRU, S5, MAMBA, MAMBA2], ids=family_id)
def test_a_trainer_cuts_when_its_ranking_is_stable_and_logs_it_from_the_first_step_on(
    family: Family, tmp_path: Path
) -> None:
    # A rate so low that the ranking hardly moves.
    trainer = trainer_of(family, tmp_path, STABLE, learning_rate=1e-6)
    trainer.train()
    events = callback_of(trainer).events
    assert [(event.step, event.outcome) for event in events] == [(3, "cut")]
    logged = [entry for entry in trainer.state.log_history if "compressm/rank_measured_layers" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert all(entry["compressm/rank_stability"] > 0.95 for entry in logged[1:])
    assert "compressm/rank_stability" not in logged[0]


def test_a_run_whose_ranking_never_settles_says_why_nothing_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.outcome.logger.warning", warnings.append)
    trainer_of(LRU, tmp_path, {**STABLE, "stability": 0.9999999999}, learning_rate=0.3).train()
    (warning,) = warnings
    assert "cut nothing" in warning
    assert "last ones: 0." in warning or "last ones: -" in warning


def test_measuring_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    ends = []
    for settings in (None, {**STABLE, "stability": 0.9999999999}):
        torch.manual_seed(0)
        trainer = trainer_of(LRU, tmp_path, settings, learning_rate=0.1)
        trainer.train()
        ends.append(dict(trainer.model.state_dict()))
    assert same(*ends)


def test_a_run_that_waits_for_its_ranking_resumes_bit_for_bit(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "learning_rate": 1e-6}
    whole = trainer_of(LRU, tmp_path, STABLE, **saving)
    whole.train()
    assert [event.step for event in callback_of(whole).events] == [3]
    for step in (1, 2, 3, 4):
        resumed = trainer_of(LRU, tmp_path, STABLE, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
        assert [event.step for event in callback_of(resumed).events] == [3]
