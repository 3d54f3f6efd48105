"""Tiny loops of one's own on the families of the table, beside the Trainer's run on the same batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, get_linear_schedule_with_warmup

from hf_compressm import Compressor
from tests.family_table import Family
from tests.trainers import HALVE, Examples, trainer_of


RATE = 1e-3
STEPS = 8


class InOrder(Trainer):
    """Takes its examples in their order, and the loss as the model returns it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def batches_of(family: Family) -> list[dict[str, Tensor]]:
    """The Trainer's batches of two, in their order."""
    rows = Examples(family).rows
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [{name: torch.stack([one[name], two[name]]) for name in one} for one, two in pairs]


class Loop:
    """A loop of one's own: model, optimizer, schedule and Compressor.

    Args:
        family: row of the table.
        settings: of the cuts.
        model: another model than the family's.
        steps: optimizer steps of the run.
        rate: learning rate at the start.
        **kwargs: further arguments of the Compressor.
    """

    def __init__(
        self,
        family: Family,
        settings: Any = HALVE,
        model: Any = None,
        steps: int = STEPS,
        rate: float = RATE,
        **kwargs: Any,
    ) -> None:
        self.batches = batches_of(family)
        self.model = (family.build() if model is None else model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, 0, steps)
        self.done = 0
        self.rates: list[float] = []
        kwargs = {"optimizer": self.optimizer, "total_steps": steps, **kwargs}
        self.compressor = Compressor(self.model, settings, **kwargs)
        self.optimizer.register_step_pre_hook(lambda one, *_: self.rates.append(one.param_groups[0]["lr"]))

    def run(self, until: int = STEPS, after: Callable[[Any], None] = lambda events: None) -> "Loop":
        """Make steps until so many are done."""
        while self.done < until:
            output = self.model(**self.batches[self.done % len(self.batches)])
            (output["loss"] if isinstance(output, dict) else output.loss).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.done += 1
            after(self.compressor.step())
        return self

    def save(self, path: Path) -> None:
        """A checkpoint in one file, as people write it."""
        parts = {name: getattr(self, name).state_dict() for name in ("compressor", "model", "optimizer", "scheduler")}
        torch.save({**parts, "done": self.done}, path)

    def load(self, path: Path) -> "Loop":
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        for name in ("compressor", "model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(saved[name])
        self.done = saved["done"]
        return self

    def state(self) -> dict[str, Any]:
        """Weights and moments."""
        return state_of(self.model, self.optimizer)


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights and moments by the names of the parameters."""
    inner = getattr(optimizer, "optimizer", optimizer)
    moments = {name: dict(inner.state[p]) for name, p in model.named_parameters() if p in inner.state}
    return {"weights": dict(model.state_dict()), "moments": moments}


def trained(family: Family, folder: Path, settings: Any, steps: int = STEPS, rate: float = RATE, **kwargs: Any) -> Any:
    """The Trainer's run on the same batches, with the same optimizer and schedule."""
    plain = {"optim": "adamw_torch", "max_grad_norm": 0.0, "lr_scheduler_type": "linear", "weight_decay": 0.0}
    trainer = trainer_of(
        family, folder, settings, max_steps=steps, learning_rate=rate, trainer_class=InOrder, **plain, **kwargs
    )
    trainer.train()
    return trainer
