"""One complex recurrent state per layer in transformers' `DynamicCache`.

transformers calls the cache `cache` since 5.24. In earlier versions `generate()` looks for `cache_params` in the
outputs and passes the cache back under that name, so both names work here with every version.

Glossary:
    slots  complex states that a layer stores: N, or N // 2 where only one of each conjugate pair is kept
"""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput


class CachedOutput(ModelOutput):
    """Base of outputs with a field `cache`, which is available as `cache_params` too."""

    cache: Cache | None

    @property
    def cache_params(self) -> Cache | None:
        """The cache, under its name in older versions of transformers."""
        return self.cache

    def __contains__(self, key: object) -> bool:
        return super().__contains__("cache" if key == "cache_params" else key)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("cache" if key == "cache_params" else key)


def one_cache(cache: Cache | None, cache_params: Cache | None, past_key_values: object = None) -> Cache | None:
    """The cache that was passed under either name.

    Raises:
        ValueError: When two different caches were passed, or one of keys and values.
    """
    if past_key_values is not None:
        raise ValueError("Got `past_key_values`; this model has no keys or values, pass its cache as `cache`.")
    if cache is not None and cache_params is not None and cache is not cache_params:
        raise ValueError("Got two caches, as `cache` and as `cache_params`, its older name; pass one, as `cache`.")
    return cache_params if cache is None else cache


def read_state(cache: Cache, layer_idx: int, batch_size: int, slots: int) -> torch.Tensor | None:
    """The state `(batch, slots)` of layer `layer_idx` in a cache, or None if it has none yet.

    Raises:
        ValueError: When the cache was made for another kind of model, another batch or another state size.
    """
    layers = cache.layers
    if layer_idx >= len(layers) or not hasattr(layers[layer_idx], "recurrent_states"):
        raise ValueError(
            f"`cache` keeps no recurrent state for layer {layer_idx}. Build it with "
            "`DynamicCache(config=model.config)`, or leave it out and use the one that the model returns."
        )
    state = layers[layer_idx].recurrent_states[0]
    if state is None:
        return None
    if state.shape[-1] != slots:
        raise ValueError(
            f"`cache` holds {state.shape[-1]} states for layer {layer_idx}, but the layer now has {slots}: the "
            "cache was filled before the layer was resized. Start again without `cache`."
        )
    if state.shape[0] != batch_size:
        raise ValueError(
            f"`cache` holds {state.shape[0]} sequences at layer {layer_idx}, but the input has {batch_size}. "
            "Continue with the same batch, or start again without `cache`."
        )
    return state


def write_state(cache: Cache, layer_idx: int, state: torch.Tensor) -> None:
    """Store the complex `state` `(batch, slots)`, detached from the graph: gradients stop at a cache."""
    layer = cache.layers[layer_idx]
    layer.recurrent_states[0] = state.detach()
    layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0] = True
    layer.dtype, layer.device = state.dtype, state.device
