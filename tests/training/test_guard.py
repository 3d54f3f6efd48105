"""A cut that hurts is taken back bit for bit, and a gentler one is tried."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.compression import CutRequest
from hf_compressm.loops.guard import guarded_cut
from tests.family_table import (
    FAMILIES,
    LRU,
    MAMBA,
    MAMBA2,
    S5_CLASSIFIER,
    Family,
    family_id,
    same,
    snapshot,
    train_step,
)
from tests.trainers import HALVE, Examples, callback_of, trainer_of


HURTS = {"target_state_size": 1, "keep": "smallest", "end": 2, "num_cuts": 1}


def everything(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights, buffers, moments, structure and config."""
    inner = getattr(optimizer, "optimizer", optimizer)
    places = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    return {
        **snapshot(model),
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "classes": [type(module).__name__ for module in model.modules()],
        "groups": [[places[id(p)] for p in group["params"]] for group in inner.param_groups],
        "moments": {
            places[id(p)]: {key: torch.as_tensor(value).clone() for key, value in state.items()}
            for p, state in inner.state.items()
        },
    }


class Losses:
    """Stands for a held-out loss: gives one value after the other, and remembers the sizes that it saw."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self) -> float:
        return self.values.pop(0)


@pytest.mark.parametrize("compat", ["stock", "best"])
@pytest.mark.parametrize("family", FAMILIES, ids=family_id)
def test_an_undone_cut_leaves_no_trace(family: Family, compat: str) -> None:
    model = family.build(state_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, optimizer, family.batch())
    before = everything(model, optimizer)
    config = CompreSSMConfig(fraction=0.75, compat=compat, max_loss_increase=0.1, max_retries=0)
    (event,) = guarded_cut(model, CutRequest(config, family.calibration(), optimizer, 3), Losses(1.0, 1.2))
    assert (event.outcome, event.before, event.after) == ("undone", 1.0, 1.2)
    assert event.result.state_sizes_after != event.sizes == event.result.state_sizes_before
    assert same(everything(model, optimizer), before)
    train_step(model, optimizer, family.batch())


@pytest.mark.parametrize("after", [1.2, float("nan"), float("inf")])
def test_each_retry_takes_half_of_the_reduction(after: float) -> None:
    model = MAMBA.build(state_size=16)
    config = CompreSSMConfig(target_state_size=4, max_loss_increase=0.1, max_retries=2)
    events = guarded_cut(model, CutRequest(config, MAMBA.calibration(), None, 0), Losses(1.0, after, after, 1.05))
    assert [event.outcome for event in events] == ["undone", "undone", "cut"]
    assert [event.attempt for event in events] == [1, 2, 3]
    assert [set(event.result.state_sizes_after.values()) for event in events] == [{4}, {10}, {13}]
    assert model.config.state_size == 13
    assert len(model.config.compressm["cuts"]) == 1


def test_the_guard_gives_up_after_its_retries() -> None:
    model = LRU.build()
    before = snapshot(model)
    config = CompreSSMConfig(target_state_size=2, max_loss_increase=0.0, max_retries=1)
    events = guarded_cut(model, CutRequest(config, LRU.calibration(), None, 0), Losses(1.0, 2.0, 1.5))
    assert [event.outcome for event in events] == ["undone", "undone"]
    assert same(snapshot(model), before)


def test_a_guard_that_fails_leaves_the_model_as_it_was() -> None:
    def fails() -> float:
        if model.config.state_size < 8:
            raise KeyboardInterrupt
        return 1.0

    model = LRU.build()
    optimizer = torch.optim.AdamW(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        guarded_cut(model, CutRequest(CompreSSMConfig(fraction=0.5, max_loss_increase=1.0), None, optimizer, 0), fails)
    assert same(everything(model, optimizer), before)


def test_nothing_is_cut_where_the_loss_is_not_finite_before() -> None:
    model = LRU.build()
    before = snapshot(model)
    config = CompreSSMConfig(fraction=0.5, max_loss_increase=1.0)
    (event,) = guarded_cut(model, CutRequest(config, LRU.calibration(), None, 0), Losses(float("nan")))
    assert event.outcome == "unchanged"
    assert "held-out loss is nan" in event.result.plan.layers[0].reason
    assert same(snapshot(model), before)
    config = replace(config, on_nonfinite="raise")
    with pytest.raises(ValueError, match="held-out loss is nan"):
        guarded_cut(model, CutRequest(config, LRU.calibration(), None, 0), Losses(float("nan")))


class Around(TrainerCallback):
    """What the model and the optimizer are before and after the guarded cut of step 2."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.after: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.seen.append(everything(kwargs["model"], kwargs["optimizer"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.seen.append(everything(kwargs["model"], kwargs["optimizer"]))


def learned(family: Family, folder: Path, **kwargs: Any) -> Any:
    """A model that has learned so much that losing its states hurts."""
    trainer = trainer_of(family, folder, None, max_steps=60, learning_rate=2e-2, **kwargs)
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("family", [LRU, MAMBA2, S5_CLASSIFIER], ids=family_id)
def test_a_cut_that_hurts_inside_a_trainer_is_undone_and_every_attempt_is_in_history_and_log(
    family: Family, tmp_path: Path
) -> None:
    around = Around()
    settings = {**HURTS, "max_loss_increase": 0.0, "max_retries": 1}
    trainer = trainer_of(
        family, tmp_path, settings, learned(family, tmp_path), callbacks=[around], save_strategy="steps", save_steps=3,
        eval_dataset=Examples(family, 8),
    )  # fmt: skip
    trainer.train()
    events = callback_of(trainer).events
    assert [event.outcome for event in events] == ["undone", "undone"]
    assert all(event.after > event.before for event in events)
    assert same(*around.seen)
    history = json.loads((tmp_path / "checkpoint-3" / "compressm_history.json").read_text())
    assert [event["outcome"] for event in history["events"]] == ["undone", "undone"]
    logged = [entry for entry in trainer.state.log_history if "compressm/undone" in entry]
    assert [(entry["compressm/attempt"], entry["compressm/undone"]) for entry in logged] == [(1, 1), (2, 1)]
    assert logged[0]["compressm/guard_after"] == events[0].after
    assert "compressm" not in trainer.model.config.to_dict()


def test_the_gentler_cut_is_accepted_and_training_goes_on(tmp_path: Path) -> None:
    model = learned(MAMBA, tmp_path)
    settings = {**HURTS, "max_retries": 5}
    trials = trainer_of(
        MAMBA, tmp_path, {**settings, "max_loss_increase": 0.0}, model, eval_dataset=Examples(MAMBA, 8)
    )
    trials.train()
    losses = [event.after - event.before for event in callback_of(trials).events]
    model = learned(MAMBA, tmp_path)
    limit = (max(losses) + min(losses)) / 2
    trainer = trainer_of(
        MAMBA, tmp_path, {**settings, "max_loss_increase": limit}, model, eval_dataset=Examples(MAMBA, 8)
    )
    trainer.train()
    events = callback_of(trainer).events
    assert events[0].outcome == "undone"
    assert events[-1].outcome == "cut"
    assert 1 < trainer.model.config.state_size < 8
    assert trainer.state.global_step == 6


def test_the_guard_disturbs_neither_generators_nor_data(tmp_path: Path) -> None:
    """A run whose every cut is undone ends as the run without the callback does."""
    ends = []
    for settings in (None, {**HURTS, "max_loss_increase": 0.0, "max_retries": 0}):
        model = learned(LRU, tmp_path)
        trainer = trainer_of(LRU, tmp_path, settings, model, eval_dataset=Examples(LRU, 8))
        trainer.train()
        ends.append(dict(trainer.model.state_dict()))
    assert callback_of(trainer).events[-1].outcome == "undone"
    assert same(*ends)


class Unlabelled(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {key: value for key, value in Examples(LRU).rows[index].items() if key != "labels"}


def test_a_guard_without_a_loss_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, {**HALVE, "max_loss_increase": 0.1}, eval_dataset=Unlabelled())
    with pytest.raises(ValueError, match=r"max_loss_increase needs a loss.*input_ids"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_evaluation_data_the_loss_is_that_of_training_batches(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, {**HALVE, "max_loss_increase": 100.0})
    trainer.train()
    (event,) = callback_of(trainer).events
    assert event.outcome == "cut"
    assert event.before is not None


def test_a_trainer_that_computes_its_own_loss_is_asked(tmp_path: Path) -> None:
    class Doubled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    losses = []
    for trainer_class in (Trainer, Doubled):
        plain = trainer_of(LRU, tmp_path, None)
        callback = CompreSSMCallback({**HALVE, "max_loss_increase": 100.0})
        trainer = trainer_class(
            model=LRU.build(),
            args=plain.args,
            train_dataset=plain.train_dataset,
            eval_dataset=Examples(LRU, 4),
            callbacks=[callback],
        )
        trainer.args.max_steps, trainer.args.learning_rate = 3, 0.0
        trainer.train()
        losses.append(callback.events[0].before)
    assert losses[1] == pytest.approx(2 * losses[0])
