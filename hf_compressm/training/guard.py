"""Whether to keep a cut: decided at once, by the loss on held-out batches."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.compression import CutRequest, apply_plan, cut, plan_cut
from hf_compressm.compression.history import CutEvent
from hf_compressm.config import CompreSSMConfig
from hf_compressm.surgery import Snapshot
from hf_compressm.training.recent import RecentBatches, unchanged
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


def guarded_cut(model: nn.Module, request: CutRequest, loss: Callable[[], float] | None = None) -> list[CutEvent]:
    """Cut; if that raises the loss too much, undo the cut exactly and try with half the reduction.

    Args:
        model: changed in place.
        request: request for the first attempt; its `max_loss_increase` and `max_retries` are used only with a `loss`.
        loss: measures the present held-out loss of the model, the same in all processes; None for no guard.

    Returns:
        One event per attempt; the last one stands unless it was undone too.
    """
    config, step = request.config, request.step or 0
    before = loss() if loss else None
    if before is not None and not math.isfinite(before):
        return [_skipped(model, request, f"the held-out loss is {before} before the cut")]
    events: list[CutEvent] = []
    for attempt in range(1, (config.max_retries if loss else 0) + 2):
        saved = Snapshot(model, request.optimizer) if loss else None
        event = CutEvent(step, cut(model, request), "", attempt, request.reduction_share, before)
        if event.result.changed and loss and saved and before is not None:
            event = _judged(event, saved, loss, before, config)
        events.append(event)
        if event.outcome != "undone":
            break
        if request.processes.is_first:
            logger.warning(
                f"The cut after step {step} (attempt {attempt}) is undone: the held-out loss went from "
                f"{before:.4g} to {event.after:.4g}, and max_loss_increase is {config.max_loss_increase:g}."
            )
        request = replace(request, reduction_share=request.reduction_share / 2)
    return events


def _judged(
    event: CutEvent, saved: Snapshot, loss: Callable[[], float], before: float, config: CompreSSMConfig
) -> CutEvent:
    """Keep the cut that was just made, or undo it."""
    try:
        after = loss()
    except BaseException:
        saved.restore()
        raise
    if after - before <= (config.max_loss_increase or 0.0):  # False for NaN too
        return replace(event, after=after)
    saved.restore()
    return replace(event, after=after, outcome="undone")


def _skipped(model: nn.Module, request: CutRequest, reason: str) -> CutEvent:
    """The event of an attempt that was not made."""
    step = request.step or 0
    if request.config.on_nonfinite == "raise":
        raise ValueError(f"No cut after step {step}: {reason}. Go back to an earlier checkpoint.")
    if request.processes.is_first:
        logger.warning(f"No layer is cut after step {step}: {reason}.")
    plan = plan_cut(model, replace(request, reduction_share=1.0))
    return CutEvent(step, apply_plan(model, plan.skipped(reason)), "unchanged")
