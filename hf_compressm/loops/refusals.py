"""Refusing, before the first step, what cannot work in a loop of one's own."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_compressm.config import CompreSSMConfig
from hf_compressm.loops.engines import find_engine
from hf_compressm.peft import underlying
from hf_compressm.peft.saved_base import check_base
from hf_compressm.surgery import check_optimizer
from hf_compressm.utils.checks import is_size, quoted
from hf_compressm.utils.processes import Processes


logger = logging.get_logger(__name__)

_OF_A_TRAINER = ("save_around_cuts", "allow_optimizer_reset")
"""Settings about checkpoints, which a loop of one's own saves and loads itself."""


def check_loop(
    model: nn.Module, wrapped: nn.Module, config: CompreSSMConfig, optimizer: Any, has_held_out_loss: bool
) -> None:
    """Refuse what cannot work, and warn of what has no effect.

    Args:
        model: the model itself.
        wrapped: the model as it is trained.
        config: settings.
        optimizer: the optimizer that trains it; None if it was not passed.
        has_held_out_loss: whether the loop has a loss of its own for the guard.

    Raises:
        ValueError: naming engine, optimizer or setting, and the way out.
    """
    processes = Processes.current()
    engine = find_engine(model, wrapped, processes.size)
    if engine:
        raise ValueError(
            f"Compressor cannot cut a model in place under {engine}. Pass the model as it is trained, on one device "
            "or inside DistributedDataParallel (with Accelerate, as accelerator.prepare returns it), or train up to a "
            "checkpoint and cut the whole model there with hf_compressm.compress."
        )
    check_base(model)
    if config.recovery_steps is not None:
        raise ValueError(
            f"recovery_steps={config.recovery_steps:g} compares a metric of the Trainer's evaluation and returns to "
            "one of the Trainer's checkpoints, and a loop of your own has neither. Use max_loss_increase= with "
            "held_out_loss= instead."
        )
    if config.max_loss_increase is not None and not has_held_out_loss and not _may_return_a_loss(model):
        raise ValueError(
            f"max_loss_increase needs a loss, and {type(underlying(model)).__name__} is not given labels, so it "
            "returns none. Pass held_out_loss= a function without arguments that returns the loss on held-out data."
        )
    if optimizer is not None:
        check_optimizer(optimizer, list(model.parameters()))
    elif processes.is_first:
        logger.warning(
            "Compressor has no optimizer: at a cut, one that was made before goes on training the old tensors, which "
            "the model no longer has, and its moments do not follow. Pass it as optimizer=, or make it anew after "
            "every cut (whenever step() returns one)."
        )
    ignored = [name for name in _OF_A_TRAINER if getattr(config, name)]
    if ignored and processes.is_first:
        logger.warning(f"{' and '.join(ignored)} has no effect in a loop of your own: save and load as you need.")


def last_step(config: CompreSSMConfig, total_steps: int | None) -> int:
    """The step at which a run ends; where that is not known and not needed, the one after the last cut.

    Raises:
        ValueError: if `total_steps` is no number of steps, or is needed and missing.
    """
    if total_steps is not None:
        if not is_size(total_steps):
            raise ValueError(f"total_steps must be a whole number of at least 1, got {quoted(total_steps)}.")
        return total_steps
    shares = [f"{name}={value:g}" for name in ("start", "end", "interval") if 0 < (value := _of(config, name)) < 1]
    if shares:
        raise ValueError(
            f"{' and '.join(shares)} is a share of the run's steps, and their number is not known. Pass total_steps=, "
            "or start, end and interval as whole numbers of steps."
        )
    return int(config.end) + 1


def _of(config: CompreSSMConfig, name: str) -> float:
    value = getattr(config, name)
    return 0 if value is None else value


def _may_return_a_loss(model: nn.Module) -> bool:
    """Whether a model's forward takes labels; a module of one's own may take them under any name."""
    inner = underlying(model)
    parameters = inspect.signature(inner.forward).parameters
    if "labels" in parameters:
        return True
    return not isinstance(inner, PreTrainedModel) and len(parameters) > 1
