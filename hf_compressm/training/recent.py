"""The last batches of a training run: kept as the Trainer passed them to its own `compute_loss`, and run again by it.

Nothing of the dataset, its sampler, collator, workers or generators is touched, run twice or run ahead.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.files.batches import UnsavableBatchError, read_batches, write_batches
from hf_compressm.files.names import BATCHES_FILE
from hf_compressm.training.trainer import wrap_methods
from hf_compressm.utils.processes import Processes


logger = logging.get_logger(__name__)

CONTAINERS = (dict, list, set, deque)
DATA = ("train_dataset", "eval_dataset")
"""Attributes of a Trainer that may be long lists of examples, which a step does not change."""
ITEMS = "num_items_in_batch"
"""The argument by which a Trainer tells its loss how many tokens a whole step has."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one call of `compute_loss` was given besides the model.

    Attributes:
        inputs: as the Trainer prepared them.
        others: further arguments, by name.
        step: steps done before the step that the call belongs to.
    """

    inputs: Any
    others: Mapping[str, Any]
    step: int = -1

    def copy(self) -> "Batch":
        """A copy that a `compute_loss` may change, with tensors of its own."""
        inputs, others = (recursively_apply(torch.clone, part) for part in (self.inputs, dict(self.others)))
        return replace(self, inputs=inputs, others=others)


class RecentBatches:
    """The last batches of a Trainer's training steps, kept while they are wanted.

    Args:
        trainer: the Trainer whose `compute_loss` is wrapped.

    Attributes:
        wanted: whether batches of the coming steps are kept.
        reference: batches that are kept for the rest of the run, to be measured on again and again.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Wrap the method."""
        self.wanted = False
        self.reference: list[Batch] = []
        self._trainer = trainer
        self._kept: deque[Batch] = deque(maxlen=0)
        wrap_methods(trainer, {"compute_loss": self._compute_loss})

    def __iter__(self) -> Iterator[Batch]:
        """The batches, oldest first."""
        return iter(list(self._kept))

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._kept)

    def begin(self, count: int) -> None:
        """Start afresh, and keep at most `count` batches."""
        self.reference = []
        self._kept = deque(maxlen=count)

    @property
    def count(self) -> int:
        """The largest number of batches that are kept."""
        return self._kept.maxlen or 0

    def clear(self) -> None:
        """Forget all batches but the reference."""
        self._kept.clear()

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch that was kept, by the Trainer's own `compute_loss`; nothing in the Trainer changes."""
        again = batch.copy()
        with unchanged(self._trainer), self._trainer.compute_loss_context_manager():
            return cast(Tensor, self._trainer.compute_loss(model, again.inputs, **again.others))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch by itself, not as a part of a step that accumulates gradients."""
        others = {name: None if name == ITEMS else value for name, value in batch.others.items()}
        return self.run(model, Batch(batch.inputs, others))

    def save(self, folder: Path) -> None:
        """Write the batches that a run needs if it resumes from this checkpoint; each process writes its own."""
        _file(folder).unlink(missing_ok=True)
        if not (self._kept or self.reference):
            return
        done = self._trainer.state.global_step  # a step that is interrupted will be run again
        kept = [batch for batch in self._kept if batch.step < done]
        parts = [[[batch.inputs, dict(batch.others)] for batch in part] for part in (kept, self.reference)]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_batches(_file(folder), parts)
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
            kept, reference = ([Batch(inputs, others) for inputs, others in part] for part in parts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_file(folder)} does not hold the batches of a run.") from error
        self._kept.extend(kept)
        self.reference = reference

    def _compute_loss(self, method: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep a batch of a training step before the Trainer's own method may change it."""
        if self.wanted and model.training and torch.is_grad_enabled():
            self._kept.append(Batch(inputs, kwargs, self._trainer.state.global_step).copy())
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
