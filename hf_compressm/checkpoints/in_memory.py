"""Giving a live model the sizes of weights that are in memory, as loops of one's own load them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_compressm.checkpoints.fitting import fit_to_checkpoint, records_of, takes_sizes_from_config
from hf_compressm.checkpoints.saved_model import SavedModel
from hf_compressm.files.weights import TensorHeader
from hf_compressm.peft import plain_modules, underlying
from hf_compressm.utils.checks import is_count, is_name, quoted


_PLACE = Path("state_dict")
"""What messages name, where those about checkpoints name a folder."""


def fit_to_weights(model: nn.Module, state_dict: Mapping[str, Any], optimizer: Any = None) -> bool:
    """Give the SSM layers of a model the state sizes that saved weights have, so that `load_state_dict` takes them.

    For a module of one's own, which is built with its original sizes. A model with a size per layer, or of a class of
    this package, is saved with `save_pretrained` and loaded with `from_pretrained`, which need no help.

    Args:
        model: a model as it was built, larger or smaller; resized parameters hold zeros until weights are loaded.
        state_dict: weights of a model of the same kind, from before a cut or after it.
        optimizer: the optimizer that trains the model, if there is one yet: it gets the new parameters, and the state
            that was saved with the weights can be loaded into it.

    Returns:
        Whether anything had another shape.

    Raises:
        ValueError: naming the layer, if the weights are those of no state size. The model is then unchanged.
    """
    shapes = {name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)}
    return fit_to_checkpoint(model, _saved(None, shapes), optimizer, records_of(underlying(model)))


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """All that `fit_to_sizes` needs to give another copy of the model its sizes, JSON-ready."""
    base = underlying(model)
    shapes = {
        f"{place}.{name}" if place else name: list(parameter.shape)
        for place, part in plain_modules(base)
        for name, parameter in part.named_parameters(recurse=False)
    }
    config = json.loads(base.config.to_json_string(use_diff=False)) if takes_sizes_from_config(base) else None
    return {"config": config, "shapes": shapes, "records": records_of(base)}


def fit_to_sizes(model: nn.Module, sizes: Any, optimizer: Any = None) -> bool:
    """Give a model the class, configuration and state sizes of another copy of it.

    Args:
        model: the model, perhaps inside a `PeftModel`.
        sizes: from `sizes_of`.
        optimizer: the optimizer that trains the model, if any; it gets the new parameters.

    Returns:
        Whether anything had another shape.

    Raises:
        ValueError: if they are not of that form, or of another kind of model. The model is then unchanged.
    """
    values = sizes if isinstance(sizes, Mapping) else {}
    config, shapes, records = values.get("config"), values.get("shapes"), values.get("records")
    fine = isinstance(shapes, Mapping) and all(is_name(name) and _is_shape(shape) for name, shape in shapes.items())
    if not (fine and isinstance(records, Mapping) and (config is None or isinstance(config, Mapping))):
        raise ValueError(f"These are no sizes of a model: {quoted(sizes)}.")
    saved = _saved(config, {name: tuple(shape) for name, shape in (shapes or {}).items()})
    return fit_to_checkpoint(model, saved, optimizer, records)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def _saved(config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> SavedModel:
    headers = {name: TensorHeader(shape, "", _PLACE) for name, shape in shapes.items()}
    return SavedModel(_PLACE, config, None, headers)
