"""Statistics of SSM layers, collected while calibration batches run through the model."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from transformers.utils import logging

from hf_compressm.families.declaring import tried
from hf_compressm.families.family import (
    CutMethod,
    SSMLayer,
)
from hf_compressm.families.gradients import Waiting, loss_of, scored_in, tell
from hf_compressm.families.sums import Statistics
from hf_compressm.families.watching import watching
from hf_compressm.peft import underlying
from hf_compressm.utils.randomness import undisturbed


logger = logging.get_logger(__name__)

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch, and returns what it gives, or a loss; only the loss is used, where one is needed."""


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as a data loader gives it, on the model's device, and return its output.

    Entries of a dict that the model's forward does not take are left out, as `Trainer` leaves out unused columns.

    Args:
        model: any module.
        batch: a dict of model inputs, or a list or tuple of positional ones; nested ones too.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(batch, str | bytes) or not isinstance(batch, Mapping | Sequence | Tensor):
        raise ValueError(f"it is a {type(batch).__name__}; a dict of model inputs is needed")
    if isinstance(batch, Sequence) and any(isinstance(part, Mapping | str) for part in batch):
        raise ValueError(
            f"it is a {type(batch).__name__} of examples that are not collated, each a {type(batch[0]).__name__}; "
            "pass batches as the model takes them, dicts of tensors"
        )
    inputs = send_to_device(batch, _device(model))
    if torch.is_grad_enabled():  # nothing that was made in inference mode has a part in a graph
        inputs = recursively_apply(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, inputs)
    if isinstance(inputs, Mapping):
        return model(**_accepted(model, inputs))
    return model(*([inputs] if isinstance(inputs, Tensor) else inputs))


def collect_statistics(
    model: nn.Module,
    layers: Sequence[SSMLayer],
    methods: Sequence[CutMethod],
    calibration: Iterable[Any] | None,
    forward: Forward = run_batch,
    may_be_empty: bool = False,
) -> list[Statistics | None]:
    """Run the calibration batches and return each layer's statistics, None where its criterion needs no data.

    The model's mode, config, buffers and gradients and the random number generators are left as they were.

    Args:
        model: the model; it is not moved.
        layers: layers to watch.
        methods: one per layer, which say what is measured of it.
        calibration: batches.
        forward: runs the model on one of them.
        may_be_empty: whether there may be no batch, since other processes have them.

    Raises:
        ValueError: if a batch cannot be run, or if there was no batch.
    """
    pairs = list(zip(layers, methods, strict=True))
    collected = [layer.family.statistics(layer.module, method.criterion) for layer, method in pairs]
    watched = [(layer, item) for layer, item in zip(layers, collected, strict=True) if item is not None]
    for (layer, method), item in zip(pairs, collected, strict=True):
        if item is not None:
            item.keeps_examples = layer.family.reruns or method.refit_steps > 0 or method.criterion == "fisher"
    if not watched:
        return collected
    refuse_single_batch(calibration)
    calibration = tried(model, layers, calibration, forward)
    count = 0
    by_loss = any(method.criterion == "fisher" for method in methods)
    waiting: list[Waiting] | None = [] if by_loss else None
    with watching(model, watched, waiting), undisturbed(model), torch.set_grad_enabled(by_loss):
        for count, batch in enumerate(calibration, start=1):
            try:
                result = forward(model, batch)
                if waiting is not None:
                    tell(waiting, loss_of(result), scored_in(batch))
                    waiting.clear()
            except torch.OutOfMemoryError:  # a Trainer may try again with smaller batches
                raise
            except Exception as error:
                raise ValueError(
                    f"Calibration batch {count}{_shapes(batch)} cannot be used: {type(error).__name__}: {error}"
                ) from error
    if count == 0 and not may_be_empty:
        raise ValueError("calibration gave no batch. Pass a list or a DataLoader; a used-up generator is empty.")
    return collected


def refuse_single_batch(calibration: Any) -> None:
    """Raise `ValueError` for one batch in place of a list of batches."""
    if isinstance(calibration, Mapping):
        raise ValueError(
            f"calibration is a single {type(calibration).__name__} (with {', '.join(map(str, calibration))}); it must "
            "be a list or another iterable of batches. Pass [batch]."
        )
    if isinstance(calibration, Tensor | str):
        raise ValueError(
            f"calibration is a {type(calibration).__name__}; it must be an iterable of dicts of model inputs, such as "
            "[{'input_ids': tokens}]."
        )


def _device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter that is in memory."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a model's forward takes."""
    parameters = inspect.signature(underlying(model).forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    unused = [name for name in inputs if name not in parameters]
    if unused:
        logger.info_once(f"Calibration leaves out {', '.join(unused)}, which {type(model).__name__} does not take.")
    return {name: value for name, value in inputs.items() if name in parameters}


def _shapes(batch: Any) -> str:
    """The shapes of a dict's tensors, in words."""
    if not isinstance(batch, Mapping):
        return ""
    shapes = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
    return f" with {shapes}"
