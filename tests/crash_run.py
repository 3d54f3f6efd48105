"""Trains tiny models in processes that can be killed: imports once, then forks a child for every job it is sent.

A job is a line of JSON on standard input. Standard output has a line for every phase that the child enters, most of
them moments at which files or the model are half-way; the child stays there for a while, so that a kill lands there.
"""

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainerState

import hf_compressm.checkpoints.sealing
import hf_compressm.compression.applying
import hf_compressm.loops.decisions
import hf_compressm.surgery.operation
import hf_compressm.training.recovery
from hf_compressm import find_last_complete_checkpoint
from hf_compressm.training.loading import CheckpointLoader
from tests.family_table import LRU, MAMBA
from tests.trainers import Examples, trainer_of
from tests.training.test_loading import outcome


ROWS = {"lru": LRU, "mamba": MAMBA}
OUTCOME = "outcome.pt"
LINGER_SECONDS = 1.0
JIT_SECONDS = 3.5  # transformers asks for the checkpoint 3 s after SIGTERM
SCENARIOS: dict[str, dict[str, Any]] = {
    "cuts": {"settings": {"fraction": 0.3, "end": 9, "num_cuts": 3}, "save_total_limit": 2},
    "recovery": {
        "settings": {
            "target_state_size": 1,
            "keep": "smallest",
            "end": 8,
            "num_cuts": 2,
            "recovery_steps": 3,
            "metric_tolerance": 0,
        },
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that what the model learns after the cut looks like harm
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1e-5,
    },
    "stable": {
        "settings": {
            "fraction": 0.3,
            "trigger": "stable",
            "stability": -1,
            "stability_window": 3,
            "interval": 1,
            "end": 11,
            "num_cuts": 2,
        }
    },
}
"""Cuts come after steps 3, 6 and 9; after 4 and 8; after 4 and 7. The one after 4 of "recovery" hurts."""


class Stage:
    """Says which phase the process is in, and stays in it for a while; sends itself SIGTERM in one of them.

    The job's `pause` is for all phases, `linger` names one to stay in for longer; `term` and `count` say where SIGTERM
    comes.
    """

    def __init__(self) -> None:
        self.job: dict[str, Any] = {}
        self.terms = 0

    def enter(self, phase: str) -> None:
        os.write(1, f"{phase}\n".encode())
        lingers = phase == self.job.get("linger")
        time.sleep(LINGER_SECONDS if lingers else self.job.get("pause", 0))
        if self.job.get("term") and phase.startswith(self.job["term"]):
            self.terms += 1
            if self.terms == self.job.get("count", 1):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(JIT_SECONDS)


STAGE = Stage()


def around(owner: Any, name: str, before: str = "", after: str = "") -> None:
    """Announce phases before and after every call of a function."""
    real: Callable = getattr(owner, name)

    def announced(*args: Any, **kwargs: Any) -> Any:
        if before:
            STAGE.enter(before)
        result = real(*args, **kwargs)
        if after:
            STAGE.enter(after)
        return result

    setattr(owner, name, announced)


def torn(path: str | Path, data: bytes) -> None:
    """Leave half a file where the whole one is about to be written."""
    Path(path).write_bytes(data[: len(data) // 2])
    STAGE.enter(f"save: half of {Path(path).name}")


def tear_writes() -> None:
    """Files that transformers writes are half there first."""
    save_weights, save, write_state = transformers.modeling_utils.safe_save_file, torch.save, TrainerState.save_to_json

    def weights(tensors: Any, filename: str, metadata: Any = None) -> None:
        torn(filename, safetensors.torch.save(tensors, metadata))
        save_weights(tensors, filename, metadata=metadata)

    def archive(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(file, str):
            buffer = io.BytesIO()
            save(value, buffer)
            torn(file, buffer.getvalue())
        save(value, file, *args, **kwargs)

    def state(self: TrainerState, path: str) -> None:
        write_state(self, path)
        torn(path, Path(path).read_bytes())
        write_state(self, path)

    transformers.modeling_utils.safe_save_file, torch.save, TrainerState.save_to_json = weights, archive, state


def tear_moves() -> None:
    """Directories that are removed, and files that are renamed, are not yet; or half."""
    remove, replace = shutil.rmtree, os.replace

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        files = [file for file in Path(path).rglob("*") if file.is_file()]
        for file in files[: len(files) // 2]:
            file.unlink()
        if files:
            STAGE.enter(f"remove: half of {'kept' if 'before-cut' in str(path) else 'old'} checkpoint")
        remove(path, *args, **kwargs)

    def renamed(source: Any, target: Any, **kwargs: Any) -> None:
        STAGE.enter(f"save: {Path(target).name} not renamed")
        replace(source, target, **kwargs)

    shutil.rmtree, os.replace = rmtree, renamed


def set_up() -> None:
    """Announce every phase of saving, cutting and rolling back."""
    tear_writes()
    tear_moves()
    applying, operation = hf_compressm.compression.applying, hf_compressm.surgery.operation
    recovery, sealing = hf_compressm.training.recovery, hf_compressm.checkpoints.sealing
    around(Trainer, "_save_checkpoint", "save: begins", "save: nothing of ours yet")
    around(Trainer, "_save_optimizer_and_scheduler", "save: weights without optimizer")
    around(transformers.trainer, "rotate_checkpoints", "save: before the rotation", "save: after the rotation")
    around(sealing, "seal_checkpoint", "save: all without seal", "save: sealed")
    around(hf_compressm.loops.decisions, "guarded_cut", "cut: begins", "cut: done")
    around(applying, "plan_cut", after="cut: planned")
    around(operation, "commit_replacements", after="cut: parameters in, optimizer old")
    around(operation, "commit_optimizer", after="cut: optimizer in, config old")
    around(recovery, "link_or_copy", "keep: one more file")
    around(CheckpointLoader, "roll_back", "roll back: begins", "roll back: done")
    around(CheckpointLoader, "_load_model", after="load: weights without optimizer")


class Steps(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        STAGE.enter(f"train: step {state.global_step + 1} begins")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        STAGE.enter(f"train: step {state.global_step + 1} almost done")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        STAGE.enter(f"evaluated: step {state.global_step}")


def train(job: dict[str, Any]) -> Trainer:
    """Train to the end from the last complete checkpoint, with a model of the original size."""
    scenario, folder, family = dict(SCENARIOS[job["scenario"]]), Path(job["folder"]), ROWS[job["family"]]
    torch.manual_seed(0)
    if "eval_strategy" in scenario:
        scenario["eval_dataset"] = Examples(family, 4)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 12, **scenario, **job.get("arguments", {})}
    trainer = trainer_of(family, folder, callbacks=[Steps()], **saving)
    trainer.train(resume_from_checkpoint=find_last_complete_checkpoint(folder))
    return trainer


def run(job: dict[str, Any]) -> None:
    """Train, and write the outcome of a run that came to its end."""
    STAGE.job = job
    STAGE.enter("start")
    trainer = train(job)
    if trainer.state.global_step == trainer.state.max_steps:
        path = Path(job["folder"]) / OUTCOME
        torch.save(outcome(trainer), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def main() -> None:
    torch.set_num_threads(1)
    set_up()
    os.write(1, b"ready\n")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(json.loads(line))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.write(1, f"pid {child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
