"""Whether to keep a cut: decided at once, by the loss on held-out batches."""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import nn
from transformers.utils import logging

from hf_compressm.compression import CutRequest, apply_plan, cut, plan_cut
from hf_compressm.compression.history import CutEvent
from hf_compressm.config import CompreSSMConfig
from hf_compressm.surgery import Snapshot


logger = logging.get_logger(__name__)


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
