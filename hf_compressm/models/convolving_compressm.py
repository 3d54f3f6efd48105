"""The short convolution of a layer with a cache of transformers, as the classes of this package run it."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache


def past_of(cache: Cache | None, layer_idx: int) -> Any:
    """The layer's part of a cache that has seen a token, else None."""
    return cache.layers[layer_idx] if cache is not None and cache.has_previous_state(layer_idx) else None


def convolve(
    layer: nn.Module, modeling: ModuleType, signal: Tensor, past: Any, cache: Cache | None, **kwargs: Any
) -> Tensor:
    """Causal convolution and activation of `(batch, channels, length)`; reads and updates the cache.

    Args:
        layer: has `conv1d`, `conv_kernel_size`, `activation` and `layer_idx`.
        modeling: transformers' file with the stock layer, in which the functions are looked up.
        signal: the input.
        past: as from `past_of`.
        cache: the whole cache, or None.
        kwargs: for the function over a whole sequence.
    """
    weight, bias, length = layer.conv1d.weight.squeeze(1), layer.conv1d.bias, signal.shape[-1]
    if past is not None and length == 1 and not past.record_past:
        return modeling.causal_conv1d_update(signal, past.conv_states[0], weight, bias, activation=layer.activation)
    if cache is not None:  # returns earlier steps together with these
        signal = cache.update_conv_state(signal, layer.layer_idx, conv_kernel_size=layer.conv_kernel_size)
    return modeling.causal_conv1d_fn(signal, weight, bias, activation=layer.activation, **kwargs)[..., -length:]


__all__ = ["convolve", "past_of"]
