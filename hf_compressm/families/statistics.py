"""Statistics of SSM layers, collected while calibration batches run through the model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.family import SSMLayer, Statistics
from hf_compressm.utils.randomness import undisturbed


def collect_statistics(
    model: nn.Module,
    layers: Sequence[SSMLayer],
    criteria: Sequence[str],
    calibration: Iterable[Mapping[str, Any]] | None,
    may_be_empty: bool = False,
) -> list[Statistics | None]:
    """Run the calibration batches and return each layer's statistics, None where its criterion needs no data.

    The model's mode, config, buffers and gradients and the random number generators are left as they were.

    Args:
        model: the model; it is not moved, and batches go to its device.
        layers: layers to watch.
        criteria: one per layer.
        calibration: dicts of model inputs.
        may_be_empty: whether there may be no batch, since other processes have them.

    Raises:
        ValueError: if a batch is not a dict or the model rejects it, or if there was no batch.
    """
    collected = [layer.family.statistics(layer.module, name) for layer, name in zip(layers, criteria, strict=True)]
    watched = [(layer, item) for layer, item in zip(layers, collected, strict=True) if item is not None]
    if not watched:
        return collected
    count = 0
    with _watching(watched), undisturbed(model), torch.no_grad():
        for count, batch in enumerate(calibration or (), start=1):
            _run(model, batch, count)
    if count == 0 and not may_be_empty:
        raise ValueError("calibration gave no batch. Pass a list or a DataLoader; a used-up generator is empty.")
    return collected


def _run(model: nn.Module, batch: Any, number: int) -> None:
    """Run one forward pass; an error names the batch."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"Calibration batch {number} is a {type(batch).__name__}; a dict of model inputs is needed.")
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        model(**inputs)
    except Exception as error:
        shapes = {key: tuple(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
        raise ValueError(
            f"The model rejected calibration batch {number} with {shapes}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _watching(watched: Sequence[tuple[SSMLayer, Statistics]]) -> Iterator[None]:
    """Feed every forward call of the layers to their statistics."""
    handles = []
    for layer, item in watched:

        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], item: Statistics = item) -> None:
            item.update(module, args, kwargs)

        handles.append(layer.module.register_forward_pre_hook(observe, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
