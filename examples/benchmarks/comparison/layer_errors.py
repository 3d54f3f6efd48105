"""How far a cut layer is from what it was, given what it was given before."""

from functools import partial
from typing import Any

import torch
from compare_cuts import Batch
from torch import Tensor, nn

from hf_compressm.families import find_layers


Outputs = list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]
"""Arguments and output of every call of a layer."""


@torch.no_grad()
def outputs_of_layers(model: nn.Module, batches: list[Batch]) -> list[Outputs]:
    """What every recurrent layer of a model is given, and what it gives."""
    modules = [layer.module for layer in find_layers(model)]
    seen: list[Outputs] = [[] for _ in modules]

    def remember(calls: Outputs, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, _first(output)))

    hooks = [
        module.register_forward_hook(partial(remember, calls), with_kwargs=True)
        for module, calls in zip(modules, seen, strict=True)
    ]
    model.eval()
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def relative_errors(model: nn.Module, seen: list[Outputs]) -> list[float]:
    """Relative error of the output of every layer on its own, `|new - old| / |old|` over all calls.

    Args:
        model: after a cut.
        seen: what `outputs_of_layers` returned before it.
    """
    model.eval()
    found = []
    for layer, calls in zip(find_layers(model), seen, strict=True):
        pairs = [(_first(layer.module(*args, **kwargs)), wanted) for args, kwargs, wanted in calls]
        error = sum(float((new - old).square().sum()) for new, old in pairs)
        found.append((error / sum(float(old.square().sum()) for _, old in pairs)) ** 0.5)
    return found


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
