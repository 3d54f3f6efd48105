"""What every process of a test under `accelerate launch` does: a list of scenarios, one after the other.

    accelerate launch --cpu --num_processes 2 tests/launched_run.py FOLDER SCENARIO...

Each process leaves `FOLDER/<scenario>/rank<r>.pt` with what it saw; one that raises leaves the error there.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_compressm import find_last_complete_checkpoint
from hf_compressm.checkpoints import sealing
from hf_compressm.surgery import operation
from hf_compressm.training import run as training_run
from hf_compressm.utils.processes import checksum
from tests.family_table import LRU, MAMBA, S5, XLSTM
from tests.trainers import Examples, Stream, callback_of, trainer_of


TWICE = {"fraction": 0.3, "end": 5, "num_cuts": 2}
"""Cuts come after steps 3 and 5."""
RUN = {"max_steps": 8}
SCENARIOS: dict[str, dict[str, Any]] = {
    "s5": {"family": S5, "settings": {**TWICE, "per_layer": False}},
    "s5-per-layer": {"family": S5, "settings": {"tolerance": 0.05, "end": 5, "num_cuts": 2, "min_reduction": 0}},
    "lru-empirical": {"family": LRU, "settings": {**TWICE, "criterion": "empirical", "calibration_batches": 4}},
    "mamba": {"family": MAMBA, "settings": TWICE},
    "fisher": {"family": MAMBA, "settings": {**TWICE, "criterion": "fisher"}},
    "mamba-per-layer": {
        "family": MAMBA,
        "settings": {"tolerance": 0.1, "end": 5, "num_cuts": 2, "min_reduction": 0, "per_layer": True},
    },
    "xlstm": {"family": XLSTM, "settings": TWICE},
    "one-batch": {"family": MAMBA, "settings": {**TWICE, "calibration_batches": 1}},
    "stream": {"family": LRU, "settings": {**TWICE, "criterion": "empirical"}, "train_dataset": Stream()},
    "stable": {
        "family": LRU,
        "settings": {
            "fraction": 0.3,
            "trigger": "stable",
            "stability": -1,
            "stability_window": 1,
            "interval": 1,
            "end": 6,
        },
    },
    "guard": {
        "family": LRU,
        "settings": {"fraction": 0.5, "end": 3, "num_cuts": 1, "max_loss_increase": 0.5},
        "eval_dataset": Examples(LRU, 6),
        "learning_rate": 1e-5,
    },
    "recovery": {
        "family": LRU,
        "settings": {
            "target_state_size": 1,
            "keep": "smallest",
            "end": 3,
            "num_cuts": 1,
            "recovery_steps": 2,
            "metric_tolerance": 0,
        },
        "eval_dataset": Examples(LRU, 6),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that what the model learns after the cut looks like harm
        "learning_rate": 1e-5,
    },
    "lora": {"family": MAMBA, "settings": TWICE, "lora": ["x_proj", "in_proj"], "learning_rate": 1e-2},
    "resume": {"family": MAMBA, "settings": TWICE, "save_strategy": "steps", "save_steps": 2},
}


class Watch(TrainerCallback):
    """Notes sizes and the bits of all weights in this process, after every cut and at the end."""

    trainer: Trainer

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, dict[str, int]]] = []  # step, checksum, sizes
        self.events = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        events = callback_of(self.trainer).events
        if len(events) > self.events:
            self.events = len(events)
            self.note(state.global_step, kwargs["model"], events[-1].sizes)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(state.global_step, kwargs["model"], {})

    def note(self, step: int, model: Any, sizes: dict[str, int]) -> None:
        self.seen.append((step, checksum(*model.parameters(), *model.buffers()), sizes))


def make(name: str, folder: Path, **more: Any) -> tuple[Trainer, Watch]:
    """The scenario's Trainer; the same model and data in every process, and in one alone."""
    scenario = {**RUN, **SCENARIOS[name], **more}
    family, watch = scenario.pop("family"), Watch()
    torch.manual_seed(0)
    if targets := scenario.pop("lora", None):
        scenario["model"] = get_peft_model(family.build(), LoraConfig(r=2, target_modules=targets))
    trainer = trainer_of(family, folder, callbacks=[watch], **scenario)
    watch.trainer = trainer
    return trainer, watch


def outcome(trainer: Trainer, watch: Watch) -> dict[str, Any]:
    """What the tests compare."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = trainer.optimizer.state_dict()["state"]
    moments = [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return {
        "seen": list(watch.seen),
        "losses": losses,
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "moments": moments,
        "outcomes": [event.outcome for event in callback_of(trainer).events],
        "config": trainer.model.config.to_dict(),
    }


def wound(name: str) -> None:
    """Let something go wrong in this process, in the middle of its first cut."""

    def fail(*args: Any) -> None:
        if name == "hurt-kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("a wound")

    def drift(*args: Any) -> Any:
        plan = prepare(*args)
        next(iter(plan.parts[0].states.values()))["exp_avg"].add_(1)
        return plan

    prepare = operation.prepare_optimizer
    if name == "hurt-drift":
        operation.prepare_optimizer = drift
    else:
        operation.commit_optimizer = fail


def run_hurt(name: str, folder: Path, rank: int) -> dict[str, Any]:
    """A run of which the second process fails in a cut: the error, and whether the model is as it was."""
    trainer, _ = make("lru-empirical", folder)
    before = dict(trainer.model.named_parameters())
    if rank == 1:
        wound(name)
    try:
        trainer.train()
    except Exception as error:
        whole = all(before[key] is value for key, value in trainer.model.named_parameters())
        return {"error": f"{type(error).__name__}: {error}", "whole": whole}
    return {}


def run_resumed(folder: Path) -> dict[str, Any]:
    """A whole run, and one that goes on from a checkpoint between its cuts; and who sealed checkpoints."""
    sealed = []
    seal = sealing.seal_checkpoint

    def noted(directory: Path, files: list[Path]) -> None:
        sealed.append(directory.name)
        seal(directory, files)

    sealing.seal_checkpoint = noted
    whole = make("resume", folder)
    whole[0].train()
    resumed = make("resume", folder)
    resumed[0].train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    files = sorted(path.name for path in (folder / "checkpoint-8").iterdir())
    complete = Path(find_last_complete_checkpoint(folder) or "").name
    outcomes = {"whole": outcome(*whole), "resumed": outcome(*resumed)}
    return {**outcomes, "sealed": sealed, "files": files, "complete": complete}


def soften(offsets: list[float]) -> None:
    """Add something to the held-out losses, one after the other: 1 after a cut lets it look like harm."""
    real = training_run.held_out_loss

    def softened(*args: Any) -> Any:
        loss = real(*args)
        return lambda: loss() + offsets.pop(0)

    training_run.held_out_loss = softened


def run(name: str, folder: Path, rank: int) -> dict[str, Any]:
    """One scenario to its end."""
    if name.startswith("hurt"):
        return run_hurt(name, folder, rank)
    if name == "resume":
        return run_resumed(folder)
    trainer, watch = make(name, folder)
    if name == "guard":
        soften([0.0, 1.0, 0.0])  # before, after the first attempt, after the gentler one
    trainer.train()
    found = outcome(trainer, watch)
    if name == "lru-empirical":  # again with the same Trainer, whose wrapper is that of the first time
        trainer.train()
        found["again"] = outcome(trainer, watch)["seen"]
    return found


def leave() -> None:
    """End this process once all are done, without the end of torch's own threads, which now and then abort it."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        torch.save(run(name, place / "run", rank), place / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
