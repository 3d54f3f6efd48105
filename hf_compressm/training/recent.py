"""The last batches of a training run: kept as the Trainer passed them to its own `compute_loss`, and run again by it.

Nothing of the dataset, its sampler, collator, workers or generators is touched, run twice or run ahead.
"""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.files.batches import UnsavableBatchError, read_batches, write_batches
from hf_compressm.files.names import BATCHES_FILE
from hf_compressm.loops.recent import Batch, RecentBatches
from hf_compressm.training.trainer import wrap_methods
from hf_compressm.utils.processes import Processes


logger = logging.get_logger(__name__)

CONTAINERS = (dict, list, set, deque)
DATA = ("train_dataset", "eval_dataset")
"""Attributes of a Trainer that may be long lists of examples, which a step does not change."""
ITEMS = "num_items_in_batch"
"""The argument by which a Trainer tells its loss how many tokens a whole step has."""


class TrainerBatches(RecentBatches):
    """The last batches of a Trainer's training steps, as its `compute_loss` was given them.

    Args:
        trainer: the Trainer whose `compute_loss` is wrapped.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Wrap the method."""
        super().__init__()
        self._trainer = trainer
        wrap_methods(trainer, {"compute_loss": self._compute_loss})

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch that was kept, by the Trainer's own `compute_loss`; nothing in the Trainer changes."""
        again = batch.copy()
        with unchanged(self._trainer), self._trainer.compute_loss_context_manager():
            return cast(Tensor, self._trainer.compute_loss(model, again.inputs, **again.others))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch by itself, not as a part of a step that accumulates gradients."""
        others = {name: None if name == ITEMS else value for name, value in batch.others.items()}
        return self.run(model, Batch(batch.inputs, others))

    @property
    def absence(self) -> str:
        """A Trainer that goes around its own `compute_loss` needs a loader."""
        return (
            f"{type(self._trainer).__name__} made a step without calling its compute_loss, where the batches for "
            "calibration are taken. Pass batches of model inputs: CompreSSMCallback(config, calibration=loader)."
        )

    @property
    def origin(self) -> str:
        """The batch comes from `compute_loss`, and goes there again."""
        return (
            f"It is the batch of the first step, run again by {type(self._trainer).__name__}.compute_loss in "
            "evaluation mode. If that cannot work, pass batches of model inputs, "
            "CompreSSMCallback(config, calibration=loader), and an eval_dataset for a guard."
        )

    def save(self, folder: Path) -> None:
        """Write the batches that a run needs if it resumes from this checkpoint; each process writes its own."""
        _file(folder).unlink(missing_ok=True)
        if not (self._kept or self.reference):
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_batches(_file(folder), self.parts(self._trainer.state.global_step))
        except UnsavableBatchError as error:
            logger.warning_once(
                f"Checkpoints cannot keep the batches before a cut: {error}. A run that resumes from {folder.name} "
                "measures its next cut on the steps after it alone, and does not end bit for bit the same."
            )

    def load(self, folder: Path) -> None:
        """Start with the batches of a checkpoint, if it has any.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        if not _file(folder).is_file():
            return
        parts = read_batches(_file(folder), self._trainer.args.device)
        try:
            self.resume(parts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_file(folder)} does not hold the batches of a run.") from error

    def _compute_loss(self, method: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep a batch of a training step before the Trainer's own method may change it."""
        if self.wanted and model.training and torch.is_grad_enabled():
            self.keep(Batch(inputs, kwargs, self._trainer.state.global_step))
        return method(model, inputs, *args, **kwargs)


@contextmanager
def unchanged(trainer: Trainer) -> Iterator[None]:
    """Restore a Trainer's attributes afterwards, with the lists and dicts in them: `compute_loss` may note metrics."""
    attributes = vars(trainer)
    before = dict(attributes)
    contents = [(held, copy.copy(held)) for name, value in before.items() if name not in DATA for held in _held(value)]
    try:
        yield
    finally:
        for name in attributes.keys() - before.keys():
            del attributes[name]
        for name, value in before.items():
            if attributes.get(name) is not value:
                attributes[name] = value
        for held, original in contents:
            if not _same_members(held, original):
                held.clear()
                (held.extend if isinstance(held, list | deque) else held.update)(original)


def _same_members(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _held(value: Any, depth: int = 4) -> Iterator[Any]:
    """The containers in a value, itself included, some levels deep."""
    if isinstance(value, CONTAINERS) and depth:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _held(part, depth - 1)


def _file(folder: Path) -> Path:
    return folder / BATCHES_FILE.format(rank=Processes.current().rank)
