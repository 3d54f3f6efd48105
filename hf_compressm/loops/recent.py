"""The last batches of a training run, kept while a measurement is near, and run again for it."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Batch:
    """What one call of a training step was given.

    Attributes:
        inputs: the batch, or positional arguments.
        others: further arguments, by name.
        step: steps done before the step that the call belongs to.
    """

    inputs: Any
    others: Mapping[str, Any]
    step: int = -1

    def copy(self) -> "Batch":
        """A copy that the call may change, with tensors of its own."""
        inputs, others = (recursively_apply(torch.clone, part) for part in (self.inputs, dict(self.others)))
        return replace(self, inputs=inputs, others=others)


class RecentBatches(ABC):
    """The last batches of training steps, kept while they are wanted.

    Attributes:
        wanted: whether batches of the coming steps are kept.
        reference: batches that are kept for the rest of the run, to be measured on again and again.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self.wanted = False
        self.reference: list[Batch] = []
        self._kept: deque[Batch] = deque(maxlen=0)

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

    def want(self, wanted: bool) -> None:
        """Keep the batches of the coming steps, or no longer."""
        self.wanted = wanted

    def clear(self) -> None:
        """Forget all batches but the reference."""
        self._kept.clear()

    def keep(self, batch: Batch) -> None:
        """Keep a copy of a batch, in place of the oldest one."""
        self._kept.append(batch.copy())

    def parts(self, done: int) -> list[Any]:
        """What a checkpoint keeps: recent batches and the reference, each batch a list of its inputs and the others.

        Args:
            done: steps done; a step that is interrupted will be run again, so its batches are left out.
        """
        kept = [batch for batch in self._kept if batch.step < done]
        return [[[batch.inputs, dict(batch.others)] for batch in part] for part in (kept, self.reference)]

    def resume(self, parts: Sequence[Any]) -> None:
        """Start with what a checkpoint kept.

        Raises:
            TypeError, ValueError: if it is not of the form of `parts`.
        """
        kept, reference = ([Batch(inputs, dict(others)) for inputs, others in part] for part in parts)
        self._kept.extend(kept)
        self.reference = reference

    @abstractmethod
    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Run a batch that was kept once more, as it was run in training."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch by itself.

        Raises:
            ValueError: if there is none.
        """

    @property
    @abstractmethod
    def absence(self) -> str:
        """What to say, and what to do, where a step has left no batch."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the batch of the first step comes from, and what to do if it cannot be used."""
