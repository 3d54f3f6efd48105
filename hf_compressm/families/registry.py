"""The registry of families, keyed on the type of the layer."""

import math
from typing import Any

from torch import nn

from hf_compressm.families.family import Family, SSMLayer
from hf_compressm.families.owners import counted_in, find_owners
from hf_compressm.peft import underlying


_FAMILIES: dict[str, dict[str, Family]] = {}
"""By the path of the layer's class, and by the attribute that tells its layers from others of the same class."""


def register(family: Family) -> None:
    """Add a family to the registry.

    Raises:
        ValueError: if its module type belongs to another family.
    """
    path = _path(family.module_type)
    present = _FAMILIES.get(path, {}).get(family.mark)
    if present is not None and present.name != family.name:
        raise ValueError(f"{path} already belongs to the family {present.name!r}.")
    _FAMILIES.setdefault(path, {})[family.mark] = family


def registered(module_type: type | str, mark: str = "") -> Family:
    """The family of a class of layers."""
    return _FAMILIES[_path(module_type)][mark]


def family_of(module: nn.Module) -> Family | None:
    """The family of a layer, that of its class before those of its bases; None for anything else."""
    for path in map(_path, type(module).__mro__):
        known = _FAMILIES.get(path, {})
        marks = [mark for mark in known if mark and getattr(module, mark, None) is not None]
        family = known.get(marks[0] if marks else "")
        if family is not None:
            return family
    return None


def registered_families() -> list[str]:
    """Names of the known families, sorted."""
    return sorted({family.name for known in _FAMILIES.values() for family in known.values()})


def size_fields() -> list[str]:
    """The configuration fields in which the known families keep their state sizes, sorted."""
    known = [family for of_class in _FAMILIES.values() for family in of_class.values()]
    return sorted({family.size_field for family in known if not family.shares_field} - {""})


def misconfigured(field: str, value: Any) -> str:
    """What is wrong with the value of one of these fields, or ""."""
    families = [family for known in _FAMILIES.values() for family in known.values() if family.size_field == field]
    if any(family.size_type is float for family in families):
        return "" if type(value) is float and 0 < value < math.inf else "must be a number with a point, and above 0"
    return "" if type(value) is int and value >= 1 else "must be a whole number of at least 1"


def find_layers(model: nn.Module) -> list[SSMLayer]:
    """All SSM layers of a model, in order; attention and MLP layers are left alone.

    Names are those in the model itself, even if it is inside peft's wrapper.

    Raises:
        ValueError: if the model has none.
    """
    base = underlying(model)
    found: list[tuple[str, nn.Module, Family]] = []
    for name, module in base.named_modules():
        family = family_of(module)
        if family is not None:
            found.append((name, module, family))
    owners = find_owners(base, [(name, family.size_field) for name, _, family in found])
    layers: list[SSMLayer] = []
    counts: dict[str, int] = {}
    for (name, module, family), owner in zip(found, owners, strict=True):
        scope = counted_in(base, name)
        counts[scope] = counts.get(scope, 0) + 1
        index = getattr(module, "layer_idx", None)
        layers.append(SSMLayer(name, module, family, counts[scope] - 1 if index is None else index, owner))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no SSM layer of a known family ({', '.join(registered_families())}). "
            "See CONTRIBUTING.md for adding a family."
        )
    return layers


def _path(module_type: type | str) -> str:
    """Dotted path of a class: the key of the registry, for which no layer has to be imported."""
    if isinstance(module_type, str):
        return module_type
    return f"{module_type.__module__}.{module_type.__qualname__}"
