"""Runs that are resumed around a cut end bit for bit where the uninterrupted run ends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.utils import logging

from hf_compressm import find_last_complete_checkpoint
from hf_compressm.resuming import watch_loading
from tests.families import FAMILIES, LRU, MAMBA, MAMBA2, S5, Family, family_id, outputs, same
from tests.training import HALVE, Examples, callback_of, trainer_of


CUT = 2  # HALVE cuts after this step
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "frozen": {},
    "shards": {},
    "epochs": {"save_strategy": "epoch", "per_device_train_batch_size": 12, "max_steps": 6},
    "bf16": {"bf16": True},
    "limit": {"save_total_limit": 3},
}


def model_of(family: Family, setting: str) -> Any:
    """A model of the original size, as user scripts build it."""
    model = family.build()
    if setting == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" not in name)
    return model


def run(family: Family, folder: Path, setting: str, resume: Path | None = None, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = trainer_of(family, folder, model=model_of(family, setting), **{**SAVING, **SETTINGS[setting], **kwargs})
    if setting == "shards":
        save = trainer.model.save_pretrained
        trainer.model.save_pretrained = lambda *args, **own: save(*args, **{**own, "max_shard_size": "1KB"})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that a run ends with, but for times."""
    timed = ("runtime", "per_second", "seconds", "train_loss")
    history = [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in trainer.state.log_history
    ]
    optimizer = trainer.optimizer.state_dict()
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "moments": optimizer["state"],
        "log": history,
        "config": trainer.model.config.to_dict(),
        "class": type(trainer.model).__name__,
        "events": [(event.step, event.outcome, event.sizes) for event in callback_of(trainer).events],
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", [LRU, MAMBA], ids=family_id)
def test_a_resumed_run_ends_where_the_whole_run_ends(family: Family, setting: str, tmp_path: Path) -> None:
    whole = outcome(run(family, tmp_path, setting))
    assert [event[:2] for event in whole["events"]] == [(CUT, "cut")]
    saved = sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    for step in saved[:-1]:  # before, at and after the cut
        copy = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / f"checkpoint-{step}", copy / f"checkpoint-{step}")
        resumed = outcome(run(family, copy, setting, copy / f"checkpoint-{step}"))
        for part, value in whole.items():
            assert same(resumed[part], value), (step, part)


@pytest.mark.parametrize("family", FAMILIES, ids=family_id)
def test_every_family_resumes_after_its_cut_into_a_model_of_the_original_size(family: Family, tmp_path: Path) -> None:
    whole = outcome(run(family, tmp_path, "plain", max_steps=4))
    resumed = outcome(run(family, tmp_path, "plain", tmp_path / "checkpoint-3", max_steps=4))
    assert all(same(resumed[part], value) for part, value in whole.items())
