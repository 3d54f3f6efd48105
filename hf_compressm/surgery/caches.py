"""Refusal of caches that were filled before a cut, and so do not fit the layer after it."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_compressm.families import SSMLayer, family_of


def refuse_stale_caches(layer: SSMLayer) -> None:
    """Make a layer of a stock class check its cache before each call; the hook is added only once.

    The hook exists in this process only. It is not saved, since a loaded model has no cache from before its cut.
    """
    if any(hook is _check_cache for hook in layer.module._forward_pre_hooks.values()):
        return
    layer.module.register_forward_pre_hook(_check_cache, with_kwargs=True)


def _check_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` if a cache among the arguments holds another number of states than the layer has."""
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    family, index = family_of(module), getattr(module, "layer_idx", None)
    axis = None if family is None else family.cache_axis
    if cache is None or family is None or axis is None or index is None:
        return
    size = family.state_size(module)
    for state in _states(cache, index):
        if isinstance(state, Tensor) and state.shape[axis] != size:
            raise ValueError(
                f"The cache holds {state.shape[axis]} states for layer {index}, which now has {size}: it was filled "
                "before the layer was cut. Start again without this cache."
            )


def _states(cache: Any, index: int) -> list[Any]:
    """The states that a cache holds for a layer, in the places that transformers has for them."""
    held = list(getattr(cache.layers[index], "recurrent_states", {}).values()) if index < len(cache.layers) else []
    linear = getattr(cache, "linear_cache", [])  # of MiniMax
    return held + linear[index : index + 1]
