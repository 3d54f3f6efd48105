"""Refusal of caches that were filled before a cut, and so do not fit the layer after it."""

from functools import partial
from typing import Any

from torch import nn

from hf_compressm.families import SSMLayer, family_of


def refuse_stale_caches(layer: SSMLayer) -> None:
    """Make a layer of a stock class check its cache before each call; the hook is added only once.

    The hook exists in this process only. It is not saved, since a loaded model has no cache from before its cut.
    """
    if any(getattr(hook, "func", None) is _check_cache for hook in layer.module._forward_pre_hooks.values()):
        return
    layer.module.register_forward_pre_hook(partial(_check_cache, layer.index), with_kwargs=True)


def _check_cache(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` if a cache among the arguments holds another number of states than the layer has."""
    family = family_of(module)
    size = None if family is None else family.state_size(module)
    for held in () if family is None else family.cached_sizes(module, (*args, *kwargs.values())):
        if held != size:
            raise ValueError(
                f"The cache holds {held} states for layer {index}, which now has {size}: it was filled "
                "before the layer was cut. Start again without this cache."
            )
