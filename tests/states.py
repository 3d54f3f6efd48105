"""All of a model and its optimizer that a cut may change, for comparisons to the last bit."""

from typing import Any

import torch

from tests.family_table import snapshot


def everything(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights, buffers, moments, structure and config."""
    inner = getattr(optimizer, "optimizer", optimizer)
    places = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    return {
        **snapshot(model),
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "classes": [type(module).__name__ for module in model.modules()],
        "groups": [[places[id(p)] for p in group["params"]] for group in inner.param_groups],
        "moments": {
            places[id(p)]: {key: torch.as_tensor(value).clone() for key, value in state.items()}
            for p, state in inner.state.items()
        },
    }
