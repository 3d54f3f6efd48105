"""A run that was begun before the package was rearranged ends where it would have: see the fixture's README."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_compressm import CompreSSMCallback, find_last_complete_checkpoint


FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_before_the_move"
SETTINGS = {"fraction": 0.5, "start": 1, "end": 5, "num_cuts": 2, "calibration_batches": 2}
NOT_THE_SAME = ("seconds", "_per_second", "runtime", "grad_norm", "total_flos")
"""Entries of the log that tell of time, or that a resumed Trainer counts anew."""
OTHER_MACHINE = 1e-4
"""Other kernels and another order of sums, over four steps of AdamW at a rate of 1e-2, in float32."""


class Rows(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.tensor([(7 * index + 3 * step * step + step) % 29 for step in range(12)])
        return {"input_ids": row, "labels": row}


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """The run as its first half was set up, with its checkpoint in the folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURE / "checkpoint-4", Path("run") / "checkpoint-4")
    torch.set_num_threads(1)
    set_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 12, "state_size": 8, "num_hidden_layers": 2}
    model = MambaForCausalLM(MambaConfig(**sizes, expand=2, time_step_rank=2, use_cache=False))
    args = TrainingArguments(
        "run",
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        optim="adamw_torch",
    )
    callback = CompreSSMCallback(SETTINGS, calibration=drawn_then(step=5))
    return Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])


def drawn_then(step: int) -> list[dict[str, torch.Tensor]]:
    """The calibration batches that the run drew before a cut, when they were drawn from the dataset."""
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:4].tolist()
    return [default_data_collator([Rows()[index] for index in pair]) for pair in (chosen[:2], chosen[2:])]


def compare(found: Any, expected: Any) -> None:
    """Closely: two processors do not even sum alike, and the run would end elsewhere if a batch or a size differed."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            compare(found[name], value)
    elif isinstance(expected, list):
        for pair in zip(found, expected, strict=True):
            compare(*pair)
    elif isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=OTHER_MACHINE)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-2)
    else:
        assert found == expected


def told(folder: Path) -> list[dict[str, float]]:
    """The log of a run without what differs from time to time."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in entry if not any(word in name for word in NOT_THE_SAME)} for entry in log]


def test_the_run_ends_where_it_would_have_ended(trainer: Trainer) -> None:
    checkpoint = find_last_complete_checkpoint("run")
    assert checkpoint == str(Path("run") / "checkpoint-4")
    trainer.train(resume_from_checkpoint=checkpoint)
    end = Path("run") / "checkpoint-8"
    assert [cut["step"] for cut in trainer.model.config.compressm["cuts"]] == [3, 5]
    compare(load_file(end / "model.safetensors"), load_file(FIXTURE / "end" / "model.safetensors"))
    states = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (end, FIXTURE / "end"))
    compare(*states)
    compare(told(end), told(FIXTURE / "end"))


def test_its_history_is_taken_over_and_written_once(trainer: Trainer) -> None:
    trainer.train(resume_from_checkpoint=str(Path("run") / "checkpoint-4"))
    end = Path("run") / "checkpoint-8"
    history = json.loads((end / "compressm_history.json").read_text())
    assert [(event["step"], event["outcome"]) for event in history["events"]] == [(3, "cut"), (5, "cut")]
    holders = [path.name for path in end.iterdir() if b"hankel_singular_values" in path.read_bytes()]
    assert holders == ["compressm_history.json"]


def test_a_checkpoint_that_was_not_sealed_has_its_history_in_the_trainers_state(trainer: Trainer) -> None:
    folder = Path("run") / "checkpoint-4"
    for name in ("compressm.complete", "compressm_history.json"):
        (folder / name).unlink()
    trainer.train(resume_from_checkpoint=str(folder))
    history = json.loads((Path("run") / "checkpoint-8" / "compressm_history.json").read_text())
    assert [event["step"] for event in history["events"]] == [3, 5]
