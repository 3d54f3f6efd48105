"""The loss by which a Trainer keeps a cut or undoes it, and what an undone cut leaves in its run."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback
from tests.family_table import (
    LRU,
    MAMBA,
    MAMBA2,
    S5_CLASSIFIER,
    Family,
    family_id,
    same,
)
from tests.states import everything
from tests.trainers import HALVE, Examples, callback_of, trainer_of


HURTS = {"target_state_size": 1, "keep": "smallest", "end": 2, "num_cuts": 1}


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
