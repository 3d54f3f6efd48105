"""Writing new state sizes into a model's config."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

Sizes = Mapping[str, Mapping[int, int | None]]
"""Values by field of the config and by layer index."""


def write_sizes(config: PreTrainedConfig, sizes: Sizes) -> None:
    """Set sizes that a config has once for all layers, such as `mamba_d_state`.

    Args:
        config: a transformers config.
        sizes: sizes by field and layer index; the layers of a field agree.
    """
    for field, by_index in sizes.items():
        if hasattr(config, field):
            setattr(config, field, max(size for size in by_index.values() if size is not None))
        else:
            logger.warning(
                f"{type(config).__name__} has no {field}: the new state sizes are in the layers and in the record "
                "config.compressm, but a model built from this config will not have them."
            )


def write_sizes_per_layer(config: PreTrainedConfig, sizes: Sizes) -> None:
    """Set the sizes of some layers: the largest goes to the field itself, sizes that differ to `per_layer_config`.

    Args:
        config: a transformers config whose models have a size per layer.
        sizes: sizes by field and layer index; layers that are not named keep theirs.
    """
    every = {field: [getattr(layer, field) for layer in config.per_layer_config] for field in sizes}
    for field, by_index in sizes.items():
        for index, size in by_index.items():
            every[field][index] = size
    overrides = _other_overrides(config, sizes)
    config.per_layer_config = None
    for field, values in every.items():
        common = None if None in values else max(values)
        setattr(config, field, common)
        for index, value in enumerate(values):
            if value != common:
                overrides.setdefault(index, {})[field] = value
    if overrides:
        config.per_layer_config = overrides


def write_sizes_of_mamba_ssm(config: Any, size: int) -> None:
    """Set the state size in the config of mamba-ssm's own language model."""
    config.ssm_cfg = {**(config.ssm_cfg or {}), "d_state": size}


def _other_overrides(config: PreTrainedConfig, sizes: Sizes) -> dict[int | str, dict[str, Any]]:
    """The entries of `per_layer_config` for other fields."""
    if not config.is_heterogeneous:
        return {}
    written = config.to_dict().get("per_layer_config", {})
    kept: dict[int | str, dict[str, Any]] = {
        int(index): {k: v for k, v in values.items() if k not in sizes} for index, values in written.items()
    }
    return {index: values for index, values in kept.items() if values}
