"""The model inside peft's `PeftModel`, and the modules and weights below its adapters."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


_INSIDE = (
    ("base_layer", "adapter_layer_names"),
    ("original_module", "set_adapter"),
    ("token_adapter", "set_adapter"),  # around embeddings some of whose tokens are trained
)
"""Names under which peft's wrappers hold the module inside, each with an attribute that only such wrappers have."""


def underlying(model: Any) -> Any:
    """The model inside peft's `PeftModel`, whose layers and configuration a cut changes; any other model itself."""
    return model.get_base_model() if is_wrapped(model) else model


def is_wrapped(model: Any) -> bool:
    """Whether a model is peft's `PeftModel`."""
    return hasattr(model, "peft_config") and callable(getattr(type(model), "get_base_model", None))


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module inside an adapter, or the original of a copy that is trained in its place; None for other modules."""
    for name, marker in _INSIDE:
        inner = module._modules.get(name)
        if inner is not None and hasattr(module, marker):
            return inner
    return None


def plain_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules, with the names that they have without adapters; modules of adapters are left out."""
    inner = wrapped_module(module)
    if inner is not None:
        yield from plain_modules(inner, prefix)
        return
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{prefix}.{name}" if prefix else name)


def effective_weight(module: Any) -> Tensor:
    """The weight `(out, in)` that a linear layer applies, with active adapters of any kind.

    With adapters, its columns are the outputs for unit vectors, which costs one product with a square matrix.
    """
    if wrapped_module(module) is None:
        return module.weight
    weight = module.weight
    basis = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return (module(basis) - module(torch.zeros_like(basis[:1]))).mT


def innermost_module(module: nn.Module) -> nn.Module:
    """The module below all adapters."""
    inner = wrapped_module(module)
    return module if inner is None else innermost_module(inner)
