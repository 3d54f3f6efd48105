"""Whether to keep a cut: decided at once, by the loss on held-out batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.compression import CutRequest, apply_plan, cut, plan_cut
from hf_compressm.compression.history import CutEvent
from hf_compressm.config import CompreSSMConfig
from hf_compressm.surgery import Snapshot
from hf_compressm.training.calibration import sample_batches
from hf_compressm.utils.processes import ALONE, Processes
from hf_compressm.utils.randomness import undisturbed


logger = logging.get_logger(__name__)

Batches = Sequence[Mapping[str, Any]]


def held_out_batches(trainer: Trainer, config: CompreSSMConfig, seed: int) -> list[Mapping[str, Any]]:
    """As many batches as for calibration, from the evaluation data or, if there are none, from the training data."""
    data = trainer.eval_dataset
    data = next(iter(data.values())) if isinstance(data, dict) else data
    with undisturbed():
        dataloader = trainer.get_train_dataloader() if data is None else trainer.get_eval_dataloader(data)
    size = trainer.args.per_device_eval_batch_size
    return sample_batches(dataloader, size, config.calibration_batches, seed)


def held_out_loss(trainer: Trainer, model: nn.Module, batches: Batches, processes: Processes = ALONE) -> float:
    """Mean loss of some batches, computed as the Trainer evaluates; model and generators do not change.

    All processes use the same batches, since the Trainer's step counts tokens over all of them, and all get the loss
    of the first one.

    Raises:
        ValueError: if a batch has no loss.
    """
    total = 0.0
    with undisturbed(model):
        for batch in batches:
            loss, _, _ = trainer.prediction_step(model, dict(batch), prediction_loss_only=True)
            if loss is None:
                raise ValueError(
                    f"max_loss_increase needs a loss, and the model gives none for a batch of {sorted(batch)}. Give "
                    "the data labels, or leave max_loss_increase out."
                )
            total += float(loss.mean())
    return processes.first(lambda: total / max(len(batches), 1))


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
