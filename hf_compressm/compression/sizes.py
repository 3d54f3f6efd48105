"""Which state sizes the settings and a layer's family allow together."""

import math
from collections.abc import Sequence

from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import SSMLayer
from hf_compressm.numerics.ranks import allowed_sizes


def sizes_of(layer: SSMLayer, config: CompreSSMConfig) -> list[int]:
    """The sizes that a layer may have after a cut, ascending; the last is its present one."""
    return allowed_sizes(layer.state_size, _multiple(layer, config), config.min_state_size, _listed(config))


def check_sizes(layers: Sequence[SSMLayer], config: CompreSSMConfig) -> None:
    """Refuse a list of sizes of which a layer could have none, however many states it had.

    Raises:
        ValueError: naming the layer, and what it asks of a size.
    """
    listed = _listed(config)
    for layer in layers if listed is not None else ():
        multiple = _multiple(layer, config)
        if not any(size % multiple == 0 and size >= config.min_state_size for size in listed or ()):
            raise ValueError(
                f"No size of sizes={listed} suits {layer.name}: of this {layer.family.name} layer all sizes are "
                f"multiples of {multiple}, with round_to={config.round_to}, and at least min_state_size="
                f"{config.min_state_size}. Add such a size, or leave the layer out with ignore_layers."
            )


def why_kept(layer: SSMLayer, config: CompreSSMConfig) -> str:
    """Why a layer that could be cut stays as it is."""
    listed = _listed(config)
    if listed is not None and len(sizes_of(layer, config)) == 1:
        return f"none of sizes={listed} that it may have is below its present size"
    return "the rule and the gate leave nothing worth cutting"


def _listed(config: CompreSSMConfig) -> list[int] | None:
    return None if config.sizes is None else [int(size) for size in config.sizes]


def _multiple(layer: SSMLayer, config: CompreSSMConfig) -> int:
    """The number of which all sizes of a layer are multiples."""
    return math.lcm(config.round_to, layer.family.granularity(layer.module))
