"""The delta rule."""

from collections.abc import Iterator

import torch
from torch import Tensor


def delta_states(
    k: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None = None,
    every: int = 1,
    chunk: int = 16,
) -> Iterator[Tensor]:
    heads = value.shape[2]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    state = (
        k.new_zeros(k.shape[0], heads, k.shape[3], value.shape[3]) if initial_state is None else initial_state.to(k)
    )
    kept = []
    span = max(chunk, every)
    for t in range(k.shape[1]):
        if g is not None:
            decay = g[:, t].exp().to(k)
            state = state * (decay[..., None, None] if decay.dim() == 2 else decay[..., None])
        kt, vt = k[:, t], value[:, t]
        error = vt - torch.einsum("bhkv,bhk->bhv", state, kt)
        if beta is not None:
            error = beta[:, t, :, None].to(k) * error
        state = state + kt[..., None] * error[:, :, None]
        kept.append(state)
        if len(kept) == span:
            yield torch.stack(kept)[every - 1 :: every]
            kept = []
    if kept:
        yield torch.stack(kept)[every - 1 :: every]
