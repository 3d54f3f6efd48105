"""The registry of families, keyed on the type of the layer."""

from torch import nn

from hf_compressm.families.family import Family, SSMLayer
from hf_compressm.peft import underlying


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a family to the registry.

    Raises:
        ValueError: if its module type belongs to another family.
    """
    path = _path(family.module_type)
    present = _FAMILIES.get(path)
    if present is not None and present.name != family.name:
        raise ValueError(f"{path} already belongs to the family {present.name!r}.")
    _FAMILIES[path] = family


def registered_families() -> list[str]:
    """Names of the known families, sorted."""
    return sorted({family.name for family in _FAMILIES.values()})


def size_fields() -> list[str]:
    """The configuration fields in which the known families keep their state sizes, sorted."""
    return sorted({family.size_field for family in _FAMILIES.values()})


def find_layers(model: nn.Module) -> list[SSMLayer]:
    """All SSM layers of a model, in order; attention and MLP layers are left alone.

    Names are those in the model itself, even if it is inside peft's wrapper.

    Raises:
        ValueError: if the model has none.
    """
    layers: list[SSMLayer] = []
    for name, module in underlying(model).named_modules():
        paths = map(_path, type(module).__mro__)
        family = next((_FAMILIES[path] for path in paths if path in _FAMILIES), None)
        if family is not None:
            index = getattr(module, "layer_idx", None)
            layers.append(SSMLayer(name, module, family, len(layers) if index is None else index))
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
