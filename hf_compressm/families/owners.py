"""Who owns a layer: the configuration that says how large its state is, and the part of the model that it describes.

| model | owner of a layer |
|---|---|
| a model of transformers | its configuration |
| a module of one's own around one or two of them | the configuration of the one that the layer lies in |
| a composite model, such as Llava with a Bamba inside | its `text_config`, as a part of the whole |
| a module with mixers that hold the configuration they were built from | each mixer's own |
| a module without any configuration | none |

Everything that depends on a configuration is decided by owners: which layers have one size, how layers are counted,
which configurations a cut rewrites, and whether a model can be built again from what it saves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compressm.utils.configurations import configuration_of, with_inner


@dataclass(frozen=True, eq=False)
class Owner:
    """A configuration that says how large some layers are.

    Attributes:
        name: dotted name in the model of the outermost module whose configuration it is, or contains it.
        module: that module.
        configs: the configuration; and its copies, where parts of one model hold equal ones.
    """

    name: str
    module: Any
    configs: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Holder:
    """A module that holds a configuration, and its dotted name in the model."""

    name: str
    module: Any
    config: Any

    def relative(self, name: str) -> str:
        """The name that a part of the model has within this module."""
        return name.removeprefix(f"{self.name}.") if self.name else name


def holders_of(model: nn.Module, layer: str) -> list[Holder]:
    """The modules around a layer, and the layer, that hold a configuration; the outermost first."""
    module: Any = model
    parts, found = layer.split(".") if layer else [], []
    for depth in range(len(parts) + 1):
        module = getattr(module, parts[depth - 1]) if depth else model
        config = configuration_of(module)
        if isinstance(config, PreTrainedConfig) or hasattr(config, "ssm_cfg"):
            found.append(Holder(".".join(parts[:depth]), module, config))
    return found


def find_owners(model: nn.Module, layers: Sequence[tuple[str, str]]) -> list[Owner | None]:
    """The owner of every layer, the same object for layers with the same one; None where no configuration has a size.

    Args:
        model: any module.
        layers: the dotted name of each layer, and the field in which its family's configurations keep the size.
    """
    known: dict[tuple[int, int], Owner] = {}
    owners: list[Owner | None] = []
    for name, field in layers:
        owner = _owner(holders_of(model, name), field)
        owners.append(owner and known.setdefault((id(owner.module), id(owner.configs[0])), owner))
    return owners


def counted_in(model: nn.Module, layer: str) -> str:
    """Name of the module among whose layers a layer is counted: the innermost one that could be saved by itself."""
    holders = holders_of(model, layer)
    models = [holder for holder in holders if isinstance(holder.module, PreTrainedModel)]
    return (models or holders or [Holder("", model, None)])[-1].name


def _owner(holders: list[Holder], field: str) -> Owner | None:
    nearest = _nearest(holders, field)
    if nearest is None:
        return None
    holder, config = nearest
    configs = [config]
    for outer in reversed(holders[: holders.index(holder)]):
        same = [each for each in with_inner(outer.config) if any(each is one for one in configs)]
        copies = [] if same else [each for each in _free(outer, holders) if _is_copy(each, config, field)]
        if same or len(copies) == 1:
            configs += copies
            holder = outer
    return Owner(holder.name, holder.module, tuple(configs))


def _nearest(holders: list[Holder], field: str) -> tuple[Holder, Any] | None:
    """The innermost configuration with the field; that of a whole model rather than that of one of its blocks."""
    models = [holder for holder in holders if isinstance(holder.module, PreTrainedModel)]
    for holder in [*reversed(models), *reversed(holders)]:
        if _has(holder.config, field):
            return holder, holder.config
        inner = [config for config in _free(holder, holders) if _has(config, field)]
        if len(inner) == 1:
            return holder, inner[0]
    return None


def _free(holder: Holder, around: list[Holder]) -> Iterator[Any]:
    """A holder's configuration and those inside it, without those of other models that lie beside the layer."""
    enclosing = {id(each.module) for each in around}
    beside = [part for part in holder.module.modules() if isinstance(part, PreTrainedModel)]
    others = {id(part.config) for part in beside if id(part) not in enclosing}
    yield from (each for each in with_inner(holder.config) if id(each) not in others)


def _has(config: Any, field: str) -> bool:
    """Whether a configuration names a state size; `hasattr` raises for one that differs from layer to layer."""
    if not isinstance(config, PreTrainedConfig):
        return hasattr(config, "ssm_cfg")
    return field in vars(config) or field in config.attribute_map or hasattr(type(config), field)


def _is_copy(config: Any, other: Any, field: str) -> bool:
    """Whether two configurations say the same of the state size."""
    if type(config) is not type(other) or not isinstance(config, PreTrainedConfig):
        return False
    one, two = config.to_dict(), other.to_dict()
    return all(one.get(name) == two.get(name) for name in (field, "num_hidden_layers", "per_layer_config"))
