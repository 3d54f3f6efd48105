"""The one list of families, keyed on the type of the layer."""

from torch import nn

from hf_compressm.adapters.base import Adapter, SSMLayer
from hf_compressm.adapters.lora import underlying


_ADAPTERS: dict[str, Adapter] = {}


def register(adapter: Adapter) -> None:
    """Make a family known.

    Raises:
        ValueError: if its module type is taken by another family.
    """
    path = _path(adapter.module_type)
    present = _ADAPTERS.get(path)
    if present is not None and present.family != adapter.family:
        raise ValueError(f"{path} already belongs to the family {present.family!r}.")
    _ADAPTERS[path] = adapter


def registered_families() -> list[str]:
    """Names of the known families, sorted."""
    return sorted({adapter.family for adapter in _ADAPTERS.values()})


def size_fields() -> list[str]:
    """The configuration fields in which the known families keep their state sizes, sorted."""
    return sorted({adapter.size_field for adapter in _ADAPTERS.values()})


def find_layers(model: nn.Module) -> list[SSMLayer]:
    """All SSM layers of a model, in order; attention and MLP layers are left alone.

    Names are those in the model itself, also where peft's wrapper is around it.

    Raises:
        ValueError: if there are none.
    """
    layers: list[SSMLayer] = []
    for name, module in underlying(model).named_modules():
        paths = map(_path, type(module).__mro__)
        adapter = next((_ADAPTERS[path] for path in paths if path in _ADAPTERS), None)
        if adapter is not None:
            index = getattr(module, "layer_idx", None)
            layers.append(SSMLayer(name, module, adapter, len(layers) if index is None else index))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no SSM layer of a known family ({', '.join(registered_families())}). "
            "See CONTRIBUTING.md for adding a family."
        )
    return layers


def _path(module_type: type | str) -> str:
    """Dotted path of a class; the key, so that no family has to be imported to be known."""
    if isinstance(module_type, str):
        return module_type
    return f"{module_type.__module__}.{module_type.__qualname__}"
