"""A cut whose metric does not recover is rolled back to the checkpoint from before it, also after a restart."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_compressm.files.names import KEPT_PREFIX
from hf_compressm.training.recovery import Recovery, keep_checkpoint
from tests.family_table import LRU, MAMBA, MAMBA2, Family, family_id, same
from tests.trainers import Examples, callback_of, trainer_of


GUARDED = {"fraction": 0.5, "end": 8, "num_cuts": 2, "recovery_steps": 2, "metric_tolerance": 0.0}
RUN = {
    "max_steps": 12,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_strategy": "steps",
    "save_steps": 1,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


class Scores:
    """Gives the metric a value for each step."""

    def __init__(self, by_step: dict[int, float]) -> None:
        self.by_step = by_step
        self.trainer: Trainer | None = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        step = self.trainer.state.global_step if self.trainer else 0
        return {"score": self.by_step.get(step, 0.5)}


def trainer_with(
    family: Family, folder: Path, by_step: dict[int, float], settings: dict[str, Any] | None = None, **kwargs: Any
) -> Trainer:
    scores = Scores(by_step)
    trainer = trainer_of(
        family,
        folder,
        {**GUARDED, **(settings or {})},
        eval_dataset=Examples(family, 4),
        compute_metrics=scores,
        **{**RUN, **kwargs},
    )
    scores.trainer = trainer
    return trainer


class Sizes(TrainerCallback):
    def __init__(self) -> None:
        self.by_step: dict[int, int] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.by_step[state.global_step + 1] = kwargs["model"].config.state_size


@pytest.mark.parametrize("compat", [pytest.param("stock", marks=pytest.mark.slow), "best"])
@pytest.mark.parametrize("family", [LRU, MAMBA, MAMBA2], ids=family_id)
def test_a_cut_that_does_not_recover_is_rolled_back_and_the_next_takes_half(
    family: Family, compat: str, tmp_path: Path
) -> None:
    sizes = Sizes()
    trainer = trainer_with(
        family, tmp_path, {4: 0.5, 6: 0.4, 8: 0.5, 10: 0.6}, {"compat": compat}, callbacks=[sizes], save_total_limit=2
    )
    trainer.train()
    events = callback_of(trainer).events
    assert [(event.step, event.outcome, event.reduction_share) for event in events] == [
        (4, "cut", 1.0),
        (6, "rolled back", 1.0),
        (8, "cut", 0.5),
    ]
    assert (events[1].before, events[1].after) == (0.5, 0.4)
    assert [sizes.by_step[step] for step in (4, 5, 6, 7, 8, 9, 12)] == [8, 4, 4, 8, 8, 6, 6]
    cuts = trainer.model.config.compressm["cuts"]
    assert [cut["step"] for cut in cuts] == [8]
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_score" in entry]
    assert evaluated == [4, 6, 8, 10, 12]  # the last step is the Trainer's own
    (logged,) = [entry for entry in trainer.state.log_history if entry.get("compressm/rolled_back")]
    assert (logged["step"], logged["compressm/layer_00/state_size"]) == (6, 8)
    assert not list(tmp_path.glob(f"{KEPT_PREFIX}*"))
    history = json.loads((tmp_path / "checkpoint-12" / "compressm_history.json").read_text())
    assert [event["outcome"] for event in history["events"]] == ["cut", "rolled back", "cut"]


class Grab(TrainerCallback):
    """Weights and moments at the start of a step, after all other callbacks."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, torch.Tensor] = {}
        self.moments: list[Any] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            inner = kwargs["optimizer"].optimizer
            self.weights = {name: value.clone() for name, value in kwargs["model"].state_dict().items()}
            self.moments = [{k: v.clone() for k, v in s.items()} for s in inner.state_dict()["state"].values()]
            self.rates = [group["lr"] for group in inner.param_groups]


def test_weights_and_moments_are_those_of_the_checkpoint_and_the_schedule_goes_on(tmp_path: Path) -> None:
    grab = Grab(6)
    trainer = trainer_with(LRU, tmp_path, {4: 0.5, 6: 0.4, 8: 0.5, 10: 0.6}, callbacks=[grab])
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(grab.weights[name], value) for name, value in weights.items())
    assert same(grab.moments, list(saved["state"].values()))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(rates) == 12
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("restart", [4, 6, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 7, 9))])
def test_a_pending_rollback_survives_a_restart(restart: int, tmp_path: Path) -> None:
    """Before the cut, before the metric, between verdict and rollback, after it, and in the second recovery."""
    by_step = {4: 0.5, 6: 0.4, 8: 0.5, 10: 0.6}
    whole = trainer_with(LRU, tmp_path / "whole", by_step)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == restart:
                raise RuntimeError("the machine went down")

    first = trainer_with(LRU, tmp_path / "again", by_step, callbacks=[Stop()])
    with pytest.raises(RuntimeError, match="went down"):
        first.train()
    second = trainer_with(LRU, tmp_path / "again", by_step)
    second.train(resume_from_checkpoint=str(tmp_path / "again" / f"checkpoint-{restart}"))
    assert same(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    assert same(second.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])
    outcomes = [[(e.step, e.outcome, e.before, e.after) for e in callback_of(t).events] for t in (whole, second)]
    assert outcomes[0] == outcomes[1]


def test_a_rollback_whose_checkpoint_is_gone_is_refused_at_the_start(tmp_path: Path) -> None:
    trainer = trainer_with(LRU, tmp_path, {4: 0.5, 6: 0.4}, max_steps=12)
    trainer.train()
    trainer = trainer_with(LRU, tmp_path, {})
    with pytest.raises(ValueError, match=r"_before-cut-checkpoint-4.*is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize(
    ("after", "greater", "worse"),
    [(0.4, True, True), (0.46, True, False), (0.6, True, False), (0.6, False, True), (0.4, False, False)]
    + [(float("nan"), greater, True) for greater in (True, False)],
)
def test_a_metric_is_worse_by_more_than_the_tolerance_or_not_at_all(after: float, greater: bool, worse: bool) -> None:
    judged = Recovery(1, 2, "x", 0.5).judged(after, 0.05, greater)
    assert judged.worse is worse


@pytest.mark.parametrize(
    ("settings", "kwargs", "match"),
    [
        ({}, {"eval_strategy": "no"}, r"eval_strategy='no'.*eval_strategy='steps'"),
        ({}, {"metric_for_best_model": "accuracy"}, r"'eval_accuracy'.*'eval_score'"),
        ({}, {"save_only_model": True}, "save_only_model=True"),
        ({}, {"save_strategy": "best"}, "save_strategy='best'"),
        ({"recovery_steps": 3, "end": 6}, {}, r"recovery_steps=3 .*less than the 3 steps"),
        ({"recovery_steps": 5, "num_cuts": 1}, {}, r"after step 13.*the run has 12"),
    ],
)
def test_a_recovery_that_could_not_be_judged_is_refused_before_the_first_step(
    settings: dict, kwargs: dict, match: str, tmp_path: Path
) -> None:
    trainer = trainer_with(LRU, tmp_path, {}, settings, **kwargs)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_metric_may_come_with_one_of_several_datasets(tmp_path: Path) -> None:
    trainer = trainer_of(
        LRU,
        tmp_path,
        {**GUARDED, "metric_tolerance": 100.0},
        eval_dataset={"near": Examples(LRU, 4), "far": Examples(LRU, 6)},
        **{**RUN, "metric_for_best_model": "far_loss", "greater_is_better": False},
    )
    trainer.train()
    assert [event.outcome for event in callback_of(trainer).events] == ["cut", "cut"]
    unknown = trainer_of(
        LRU,
        tmp_path,
        GUARDED,
        eval_dataset={"near": Examples(LRU, 4)},
        **{**RUN, "metric_for_best_model": "far_loss"},
    )
    with pytest.raises(ValueError, match=r"'eval_far_loss'.*eval_near_loss"):
        unknown.train()


def test_the_loss_is_the_metric_where_none_is_named(tmp_path: Path) -> None:
    trainer = trainer_of(
        LRU,
        tmp_path,
        {**GUARDED, "metric_tolerance": 100.0},
        eval_dataset=Examples(LRU, 4),
        **{**RUN, "metric_for_best_model": None, "greater_is_better": None},
    )
    trainer.train()
    assert [event.outcome for event in callback_of(trainer).events] == ["cut", "cut"]


def test_a_kept_checkpoint_does_not_change_when_the_original_is_removed(tmp_path: Path) -> None:
    original = tmp_path / "checkpoint-3"
    (original / "sub").mkdir(parents=True)
    (original / "sub" / "file").write_text("as it was")
    name = keep_checkpoint(original)
    shutil.rmtree(original)
    assert (tmp_path / name / "sub" / "file").read_text() == "as it was"
    with pytest.raises(ValueError, match="checkpoint-3 is missing"):
        keep_checkpoint(original)


@pytest.mark.parametrize("limit", [None, 1])
def test_checkpoints_around_cuts_are_saved_on_request(limit: int | None, tmp_path: Path) -> None:
    settings = {"fraction": 0.3, "end": 6, "num_cuts": 2, "save_around_cuts": True}
    trainer = trainer_of(LRU, tmp_path, settings, max_steps=9, save_total_limit=limit)
    trainer.train()
    saved = sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == ([3, 4, 6, 7] if limit is None else [7])
    assert all((tmp_path / f"checkpoint-{step}" / "compressm.complete").exists() for step in saved)
