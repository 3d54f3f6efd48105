"""Whether to keep a cut: decided at once, by the loss on held-out batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.adapters import undisturbed
from hf_compressm.batches import generators_restored, sample_batches
from hf_compressm.compression import apply_plan, compress, plan_compression
from hf_compressm.config import CompreSSMConfig
from hf_compressm.history import CutEvent
from hf_compressm.processes import ALONE, Processes
from hf_compressm.surgery import Snapshot


logger = logging.get_logger(__name__)

Batches = Sequence[Mapping[str, Any]]


def held_out_batches(trainer: Trainer, config: CompreSSMConfig, seed: int) -> list[Mapping[str, Any]]:
    """As many batches as for calibration: of the evaluation data, or of the training data where there is none."""
    data = trainer.eval_dataset
    data = next(iter(data.values())) if isinstance(data, dict) else data
    with generators_restored():
        dataloader = trainer.get_train_dataloader() if data is None else trainer.get_eval_dataloader(data)
    size = trainer.args.per_device_eval_batch_size
    return sample_batches(dataloader, size, config.calibration_batches, seed)


def held_out_loss(trainer: Trainer, model: nn.Module, batches: Batches, processes: Processes = ALONE) -> float:
    """Mean loss of some batches, computed as the Trainer evaluates; leaves model and generators as they are.

    All processes go through the same batches, since the Trainer's step counts tokens over all of them, and get the
    loss that the first one has.

    Raises:
        ValueError: if a batch has no loss.
    """
    total = 0.0
    with undisturbed(model), generators_restored():
        for batch in batches:
            loss, _, _ = trainer.prediction_step(model, dict(batch), prediction_loss_only=True)
            if loss is None:
                raise ValueError(
                    f"max_loss_increase needs a loss, and the model gives none for a batch of {sorted(batch)}. Give "
                    "the data labels, or leave max_loss_increase out."
                )
            total += float(loss.mean())
    return processes.first(lambda: total / max(len(batches), 1))


def guarded_cut(
    model: nn.Module,
    config: CompreSSMConfig,
    calibration: Batches | None,
    optimizer: Any,
    step: int,
    reduction_share: float = 1.0,
    loss: Callable[[], float] | None = None,
    processes: Processes = ALONE,
) -> list[CutEvent]:
    """Cut; where that raises the loss too much, take it back exactly and try with half the reduction.

    Args:
        model: changed in place.
        config: settings; `max_loss_increase` and `max_retries` are used with a `loss` only.
        calibration: model-input dicts, or None where no layer needs them.
        optimizer: the optimizer that trains the model.
        step: optimizer steps done.
        reduction_share: of the first attempt.
        loss: measures the held-out loss of the model as it is, the same in all processes; None for no guard.
        processes: that train the model together.

    Returns:
        One event per attempt, the last of which stands unless it was undone too.
    """
    before = loss() if loss else None
    if before is not None and not math.isfinite(before):
        return [_skipped(model, config, calibration, step, processes, f"the held-out loss is {before} before the cut")]
    events: list[CutEvent] = []
    for attempt in range(1, (config.max_retries if loss else 0) + 2):
        saved = Snapshot(model, optimizer) if loss else None
        result = compress(model, config, calibration, optimizer, step, reduction_share, processes)
        event = CutEvent(step, result, "", attempt, reduction_share, before)
        if result.changed and loss and saved and before is not None:
            event = _judged(event, saved, loss, before, config)
        events.append(event)
        if event.outcome != "undone":
            break
        if processes.is_first:
            logger.warning(
                f"The cut after step {step} (attempt {attempt}) is undone: the held-out loss went from "
                f"{before:.4g} to {event.after:.4g}, and max_loss_increase is {config.max_loss_increase:g}."
            )
        reduction_share /= 2
    return events


def _judged(
    event: CutEvent, saved: Snapshot, loss: Callable[[], float], before: float, config: CompreSSMConfig
) -> CutEvent:
    """Keep the cut that was just made, or take it back."""
    try:
        after = loss()
    except BaseException:
        saved.restore()
        raise
    if after - before <= (config.max_loss_increase or 0.0):  # False for NaN too
        return replace(event, after=after)
    saved.restore()
    return replace(event, after=after, outcome="undone")


def _skipped(
    model: nn.Module,
    config: CompreSSMConfig,
    calibration: Batches | None,
    step: int,
    processes: Processes,
    reason: str,
) -> CutEvent:
    if config.on_nonfinite == "raise":
        raise ValueError(f"No cut after step {step}: {reason}. Go back to an earlier checkpoint.")
    if processes.is_first:
        logger.warning(f"No layer is cut after step {step}: {reason}.")
    plan = plan_compression(model, config, calibration, processes=processes)
    return CutEvent(step, apply_plan(model, plan.skipped(reason)), "unchanged")
