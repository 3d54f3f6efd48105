"""The state sizes that a saved configuration names, checked before anything is built from them."""

from collections.abc import Iterator, Mapping
from typing import Any

from hf_compressm.families import misconfigured, size_fields
from hf_compressm.utils.checks import quoted


MOST_LAYERS = 10_000


def check_sizes(values: Mapping[str, Any]) -> None:
    """Make sure that every state size is one, and belongs to a layer that exists.

    Args:
        values: contents of a `config.json`.

    Raises:
        ValueError: naming the field and the value.
    """
    for place, own in described(values):
        _check_layers(place, own)
    for field, size in named_sizes(values):
        if problem := misconfigured(field.rpartition(".")[2], size):
            raise ValueError(f"{field} {problem}, got {quoted(size)}.")


def described(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A configuration and those inside it, such as `text_config`, each with the place of its fields."""
    yield place, values
    for name, inner in values.items():
        if isinstance(inner, Mapping) and "model_type" in inner:
            yield from described(inner, f"{place}{name}.")


def named_sizes(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every state size of a configuration with its place; null is left out, in fields that other families use."""
    for start, own in described(values):
        for index, source in [("", own), *(own.get("per_layer_config") or {}).items()]:
            place = f"{start}per_layer_config[{quoted(index)}]." if index else start
            yield from ((place + field, source[field]) for field in size_fields() if source.get(field) is not None)


def _check_layers(place: str, values: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless `per_layer_config` names layers that exist."""
    per_layer = values.get("per_layer_config") or {}
    if not isinstance(per_layer, Mapping):
        raise ValueError(f"{place}per_layer_config must be an object of layers, got {quoted(per_layer)}.")
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # configuration classes make lists of that length
        raise ValueError(f"{place}num_hidden_layers must be at most {MOST_LAYERS}, got {quoted(layers)}.")
    for index, own in per_layer.items():
        known = isinstance(index, str) and index.isdecimal()
        if not known or (isinstance(layers, int) and int(index) >= layers):
            raise ValueError(
                f"{place}per_layer_config names layer {quoted(index)}, and num_hidden_layers is {quoted(layers)}."
            )
        if not isinstance(own, Mapping):
            raise ValueError(f"{place}per_layer_config[{quoted(index)}] must be an object, got {quoted(own)}.")
