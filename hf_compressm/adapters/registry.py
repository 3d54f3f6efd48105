"""The one list of families, keyed on the type of the layer."""

from torch import nn

from hf_compressm.adapters.base import Adapter, SSMLayer


_ADAPTERS: dict[type[nn.Module], Adapter] = {}


def register(adapter: Adapter) -> None:
    """Make a family known.

    Raises:
        ValueError: if its module type is taken by another family.
    """
    present = _ADAPTERS.get(adapter.module_type)
    if present is not None and present.family != adapter.family:
        raise ValueError(f"{adapter.module_type.__name__} already belongs to the family {present.family!r}.")
    _ADAPTERS[adapter.module_type] = adapter


def registered_families() -> list[str]:
    """Names of the known families, sorted."""
    return sorted({adapter.family for adapter in _ADAPTERS.values()})


def find_layers(model: nn.Module) -> list[SSMLayer]:
    """All SSM layers of a model, in order; attention and MLP layers are left alone.

    Raises:
        ValueError: if there are none.
    """
    layers: list[SSMLayer] = []
    for name, module in model.named_modules():
        adapter = next((_ADAPTERS[kind] for kind in type(module).__mro__ if kind in _ADAPTERS), None)
        if adapter is not None:
            layers.append(SSMLayer(name, module, adapter, getattr(module, "layer_idx", len(layers))))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no SSM layer of a known family ({', '.join(registered_families())}). "
            "See CONTRIBUTING.md for adding a family."
        )
    return layers
