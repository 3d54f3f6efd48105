"""The loss by which a Trainer's run keeps a cut or undoes it: on held-out batches, as the Trainer evaluates them."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.loops.recent import RecentBatches
from hf_compressm.training.recent import unchanged
from hf_compressm.utils.processes import ALONE, Processes
from hf_compressm.utils.randomness import undisturbed


logger = logging.get_logger(__name__)


def held_out_loss(
    trainer: Trainer, model: nn.Module, recent: RecentBatches, seed: int, processes: Processes = ALONE
) -> Callable[[], float]:
    """A function that measures the loss on the same batches each time it is called.

    They are a few of the evaluation data, as the Trainer loads and evaluates them; without evaluation data, the
    batches of the last training steps.

    Args:
        trainer: the Trainer of the run.
        model: the model; neither it nor the generators change.
        recent: the batches of the last steps, and how many batches are wanted.
        seed: decides which evaluation examples are taken.
        processes: each has a part of the batches, and gets the mean over all of them.

    Raises:
        ValueError: from the function, if a batch has no loss.
    """
    if trainer.eval_dataset is None:
        batches: list[Any] = list(recent)
        return lambda: _mean_loss(lambda batch: recent.loss(model, batch), batches, trainer, model, processes)
    batches = evaluation_batches(trainer, recent.count, seed, processes)
    return lambda: _mean_loss(lambda batch: _evaluated(trainer, model, batch), batches, trainer, model, processes)


def evaluation_batches(trainer: Trainer, count: int, seed: int, processes: Processes = ALONE) -> list[Any]:
    """The first batches of an evaluation of a few examples, loaded by the Trainer's own `get_eval_dataloader`."""
    data: Any = trainer.eval_dataset
    data = next(iter(data.values())) if isinstance(data, dict) else data
    few = few_examples(data, count * trainer.args.per_device_eval_batch_size * processes.size, seed)
    with aside(trainer):
        return list(trainer.get_eval_dataloader(few))


@contextmanager
def aside(trainer: Trainer) -> Iterator[None]:
    """Load data without a trace in a Trainer, the generators, and a collator that has a generator of its own."""
    with undisturbed(), unchanged(trainer):
        try:
            trainer.data_collator = copy.deepcopy(trainer.data_collator)
        except Exception as error:
            logger.debug(f"The collator cannot be copied: {error}")
        yield


def check_held_out_loss(trainer: Trainer, model: nn.Module) -> None:
    """Make sure that an evaluation batch has a loss.

    Raises:
        ValueError: if it has none.
    """
    batches = evaluation_batches(trainer, 1, 0, Processes.current())[:1]
    _mean_loss(lambda batch: _evaluated(trainer, model, batch), batches, trainer, model, ALONE)


def few_examples(data: Any, count: int, seed: int) -> Any:
    """A dataset of some examples of another one, in their order: a random sample, or the first ones of a stream."""
    if not hasattr(data, "__len__"):
        return cast(Any, list(itertools.islice(iter(data), count)))
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(len(data), generator=generator)[:count].tolist())
    return data.select(chosen) if hasattr(data, "select") else Subset(data, chosen)


def _evaluated(trainer: Trainer, model: nn.Module, batch: Any) -> Tensor:
    loss, _, _ = trainer.prediction_step(model, copy.copy(batch), prediction_loss_only=True)
    if loss is None:
        raise ValueError(
            f"max_loss_increase needs a loss, and the model gives none for a batch of {sorted(batch)}. Give "
            "the data labels, or leave max_loss_increase out."
        )
    return loss


def _mean_loss(
    loss: Callable[[Any], Tensor], batches: Sequence[Any], trainer: Trainer, model: nn.Module, processes: Processes
) -> float:
    with undisturbed(model), unchanged(trainer), torch.no_grad():
        losses = [float(loss(batch).mean()) for batch in batches]
    every = [one for part in processes.gather(losses) for one in part]
    return sum(every) / max(len(every), 1)
