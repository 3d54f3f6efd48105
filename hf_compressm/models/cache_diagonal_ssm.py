"""One complex recurrent state per layer in transformers' `DynamicCache`.

Glossary:
    slots  complex states that a layer stores: N, or N // 2 where only one of each conjugate pair is kept
"""

import torch
from transformers.cache_utils import Cache


def read_state(cache_params: Cache, layer_idx: int, batch_size: int, slots: int) -> torch.Tensor | None:
    """Returns layer `layer_idx`'s state `(batch, slots)` from a cache, or None if it has none yet.

    Raises:
        ValueError: When the cache was made for another kind of model, another batch or another state size.
    """
    layers = cache_params.layers
    if layer_idx >= len(layers) or not hasattr(layers[layer_idx], "recurrent_states"):
        raise ValueError(
            f"`cache_params` keeps no recurrent state for layer {layer_idx}. Build it with "
            "`DynamicCache(config=model.config)`, or leave it out and use the one that the model returns."
        )
    state = layers[layer_idx].recurrent_states[0]
    if state is None:
        return None
    if state.shape[-1] != slots:
        raise ValueError(
            f"`cache_params` holds {state.shape[-1]} states for layer {layer_idx}, but the layer now has {slots}: the "
            "cache was filled before the layer was resized. Start again without `cache_params`."
        )
    if state.shape[0] != batch_size:
        raise ValueError(
            f"`cache_params` holds {state.shape[0]} sequences at layer {layer_idx}, but the input has {batch_size}. "
            "Continue with the same batch, or start again without `cache_params`."
        )
    return state


def write_state(cache_params: Cache, layer_idx: int, state: torch.Tensor) -> None:
    """Stores the complex `state` `(batch, slots)`, cut off from the graph: gradients stop at a cache."""
    layer = cache_params.layers[layer_idx]
    layer.recurrent_states[0] = state.detach()
    layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0] = True
    layer.dtype, layer.device = state.dtype, state.device
