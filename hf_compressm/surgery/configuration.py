"""Writing new state sizes and the record of cuts into a model's config."""

from collections.abc import Mapping
from typing import Any


def read_sizes(config: Any, field: str) -> list[int]:
    """State size of every layer as the config has it."""
    return [int(getattr(layer, field)) for layer in config.per_layer_config]


def write_sizes(config: Any, field: str, sizes: Mapping[int, int]) -> None:
    """Set the state sizes of some layers; one common size is written plainly, others go to `per_layer_config`.

    Args:
        config: a transformers config.
        field: its field for the state size.
        sizes: new size by layer index.
    """
    every = read_sizes(config, field)
    for index, size in sizes.items():
        every[index] = int(size)
    others = _other_overrides(config, field)
    config.per_layer_config = None
    setattr(config, field, max(every))
    overrides = {index: dict(values) for index, values in others.items()}
    for index, size in enumerate(every):
        if size != max(every):
            overrides.setdefault(index, {})[field] = size
    if overrides:
        config.per_layer_config = overrides


def _other_overrides(config: Any, field: str) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says of other fields."""
    if not config.is_heterogeneous:
        return {}
    written = config.to_dict().get("per_layer_config", {})
    kept = {int(index): {k: v for k, v in values.items() if k != field} for index, values in written.items()}
    return {index: values for index, values in kept.items() if values}
