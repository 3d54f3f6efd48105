"""Writing state sizes into the configurations that own the layers, each a copy for this model alone.

A configuration object may belong to other models too: a teacher and its student are often built from one. So nothing
is written into the objects that a model holds. It gets copies, and within the model they relate to one another as the
originals do: the backbone of a language model still holds the configuration of the whole.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_compressm.families import Holder, SSMLayer, holders_of
from hf_compressm.models import adopt_config, own_config_class
from hf_compressm.peft import underlying


logger = logging.get_logger(__name__)

Sizes = Mapping[str, Mapping[int, int | float | None]]
"""Values by field of the config and by layer index."""
Fields = Mapping[str, int | float]
"""A layer's values by field of its config, the state size among them."""
Record = Callable[[Any, Holder, Sequence[str]], None]
"""Called with a new configuration, the module that holds it, and the names of the layers in it that change."""


@dataclass(frozen=True, eq=False)
class Copies:
    """Copies of configurations for the parts of a model, not yet in place.

    Attributes:
        model: the model, perhaps inside a `PeftModel`.
        parts: by id of a module: the module, and the copies of what it and its parts hold, by id of the original.
    """

    model: nn.Module
    parts: dict[int, tuple[nn.Module, dict[int, Any]]] = field(default_factory=dict)
    _originals: list[Any] = field(default_factory=list)  # kept alive, so that no id is used again

    def of(self, module: nn.Module, config: Any) -> Any:
        """The copy that a part of the model gets of a configuration; the same one when asked again."""
        _, memo = self.parts.setdefault(id(module), (module, {}))
        self._originals.append(config)
        return copy.deepcopy(config, memo)

    def commit(self) -> None:
        """Put the copies in place of the originals, in every module that holds one."""
        base = underlying(self.model)
        for top, memo in self.parts.values():
            replace_configs(self.model if top is base else top, memo)


def replace_configs(model: nn.Module, new: Mapping[int, Any]) -> None:
    """Replace configurations by others, given by id of the present one, in a module and all its parts."""
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in new and (isinstance(value, PreTrainedConfig) or hasattr(value, "ssm_cfg")):
                vars(module)[name] = new[id(value)]


def detach_configs(model: nn.Module) -> None:
    """Give a model copies of all its configurations, which can be changed without changing those of other models."""
    copies = Copies(model)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                copies.of(model, value)
    copies.commit()


def rewritten(
    model: nn.Module, layers: Sequence[SSMLayer], values: Mapping[str, Fields], record: Record, adopts: bool = False
) -> Copies:
    """The configurations of a model with other sizes, without touching the present ones.

    Args:
        model: any module, perhaps inside a `PeftModel`.
        layers: the layers that a plan has considered, or all.
        values: by layer name, for the layers whose size changes.
        record: writes into every configuration around such a layer what happened to its layers.
        adopts: whether the model moves into this package's class, with its configuration.
    """
    base, copies = underlying(model), Copies(model)
    owners = {id(layer.owner): layer.owner for layer in layers if layer.owner is not None and layer.name in values}
    for owner in owners.values():
        changed = [layer for layer in layers if layer.owner is owner and layer.name in values]
        copies.of(owner.module, getattr(owner.module, "config"))  # noqa: B009 - no attribute for mypy
        for config in owner.configs:
            new = copies.of(owner.module, config)
            if adopts:
                adopt_config(new)
            _write(new, changed, values)
    _record(base, layers, values, record, copies)
    return copies


def is_described(model: nn.Module, layers: Sequence[SSMLayer]) -> bool:
    """Whether a model's own configuration, or one inside it, says how large each of the layers is."""
    return isinstance(model, PreTrainedModel) and all(layer.owner and layer.owner.module is model for layer in layers)


def tell_undescribed(model: nn.Module, layers: Sequence[SSMLayer]) -> None:
    """Warn of models around a layer whose configuration does not have its size."""
    base = underlying(model)
    told: dict[tuple[str, str], str] = {}
    for layer in layers:
        around = [holder for holder in holders_of(base, layer.name) if isinstance(holder.config, PreTrainedConfig)]
        outermost = next((h for h in around if isinstance(h.module, PreTrainedModel) or h.module is base), None)
        if outermost is None or (layer.owner is not None and len(layer.owner.name) <= len(outermost.name)):
            continue
        told.setdefault((type(outermost.config).__name__, layer.family.size_field), layer.name)
    for (kind, size_field), name in told.items():
        logger.warning(
            f"{kind} has no {size_field} for {name}"
            ": the new state sizes are in the layers and in the record config.compressm, "
            "but a model built from this config will not have them."
        )


def has_room(config: Any, layer: SSMLayer) -> bool:
    """Whether a configuration has room for a size of this layer's own, different from those of its other layers."""
    per_layer = layer.family.per_layer or own_config_class(type(config)) is type(config)
    return per_layer and layer.index < getattr(config, "num_hidden_layers", 0)


def write_sizes(config: PreTrainedConfig, sizes: Sizes) -> None:
    """Set sizes that a config has once for all layers, such as `mamba_d_state`.

    Args:
        config: a transformers config with these fields.
        sizes: sizes by field and layer index; the layers of a field agree.
    """
    for name, by_index in sizes.items():
        setattr(config, name, max(size for size in by_index.values() if size is not None))


def write_sizes_per_layer(config: PreTrainedConfig, sizes: Sizes) -> None:
    """Set the sizes of some layers: the largest goes to the field itself, sizes that differ to `per_layer_config`.

    Args:
        config: a transformers config whose models have a size per layer.
        sizes: sizes by field and layer index; layers that are not named keep theirs.
    """
    every = {name: [getattr(layer, name) for layer in config.per_layer_config] for name in sizes}
    for name, by_index in sizes.items():
        for index, size in by_index.items():
            every[name][index] = size
    overrides = _other_overrides(config, sizes)
    config.per_layer_config = None
    for name, values in every.items():
        common = None if None in values else max(values)
        setattr(config, name, common)
        for index, value in enumerate(values):
            if value != common:
                overrides.setdefault(index, {})[name] = value
    if overrides:
        config.per_layer_config = overrides


def write_sizes_of_mamba_ssm(config: Any, size: int | float) -> None:
    """Set the state size in the config of mamba-ssm's own language model."""
    config.ssm_cfg = {**(config.ssm_cfg or {}), "d_state": size}


def _write(config: Any, layers: Sequence[SSMLayer], values: Mapping[str, Fields]) -> None:
    """Write the values of an owner's layers into its configuration."""
    if not isinstance(config, PreTrainedConfig):
        write_sizes_of_mamba_ssm(config, max(values[layer.name][layer.family.size_field] for layer in layers))
        return
    sizes: dict[str, dict[int, int | float | None]] = {}
    for layer in layers:
        for name, value in values[layer.name].items():
            sizes.setdefault(name, {})[layer.index] = value
    room = all(has_room(config, layer) for layer in layers)
    (write_sizes_per_layer if room else write_sizes)(config, sizes)


def _record(
    base: nn.Module, layers: Sequence[SSMLayer], values: Mapping[str, Fields], record: Record, copies: Copies
) -> None:
    """Record in every configuration around a layer that changes what happened to the layers within its holder.

    The record is where the sizes are, for whoever saves that part, and in the configuration of the whole, for whoever
    reads what the whole saves.
    """
    found: dict[tuple[int, int], tuple[nn.Module, Any, Holder, list[SSMLayer]]] = {}
    for layer in layers:
        for top, config, holder in _places(base, layer):
            entry = found.setdefault((id(top), id(config)), (top, config, holder, []))
            entry[3].append(layer)
    for top, config, holder, within in found.values():
        if any(layer.name in values for layer in within):
            record(copies.of(top, config), holder, [layer.name for layer in within])


def _places(base: nn.Module, layer: SSMLayer) -> list[tuple[nn.Module, Any, Holder]]:
    """The configurations that keep the record of a layer: with the part that gets a copy, and who holds it."""
    owner = layer.owner
    places: dict[int, tuple[nn.Module, Any, Holder]] = {}
    holders = [holder for holder in holders_of(base, layer.name) if isinstance(holder.config, PreTrainedConfig)]
    models = [holder for holder in holders if isinstance(holder.module, PreTrainedModel) or holder.module is base]
    owned = [] if owner is None else [config for config in owner.configs if isinstance(config, PreTrainedConfig)]
    own = [holder for holder in holders if any(holder.config is config for config in owned)]
    for holder in [*models, *own]:
        is_inside = owner is not None and len(holder.name) >= len(owner.name)
        top = owner.module if owner is not None and is_inside else holder.module
        places.setdefault(id(holder.config), (top, holder.config, holder))
    if owner is not None:  # a configuration that no module holds, only the one around it
        for config in owned:
            places.setdefault(id(config), (owner.module, config, Holder(owner.name, owner.module, config)))
    return list(places.values())


def _other_overrides(config: PreTrainedConfig, sizes: Sizes) -> dict[int | str, dict[str, Any]]:
    """The entries of `per_layer_config` for other fields."""
    if not config.is_heterogeneous:
        return {}
    written = config.to_dict().get("per_layer_config", {})
    kept: dict[int | str, dict[str, Any]] = {
        int(index): {k: v for k, v in values.items() if k not in sizes} for index, values in written.items()
    }
    return {index: values for index, values in kept.items() if values}
