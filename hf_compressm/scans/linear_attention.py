"""States of gated linear attention, which forgets every state by itself and erases nothing.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T

Source: Gated Linear Attention, arXiv 2312.06635, equation 3. Shapes are those of `delta.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .ssd import text_starts


KEPT_AT_ONCE = 16
"""States in a chunk."""


@torch.no_grad()
def linear_states(
    key: Tensor,
    value: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    every: int = 1,
    seq_idx: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the states chunk by chunk, without gradients.

    Args:
        key: (batch, length, heads, dk).
        value: (batch, length, heads, dv).
        g: Log decay, (batch, length, heads, dk).
        initial_state: State before the first step, (batch, heads, dk, dv); zero if None.
        every: Yield only the states after every `every`-th step.
        seq_idx: Index of the text that a step belongs to, (batch, length); one text per row if None.

    Yields:
        States (chunk, batch, heads, dk, dv), which may be written to.
    """
    decay = g.to(key.dtype).exp()
    if seq_idx is not None:
        decay = decay.masked_fill(text_starts(seq_idx)[..., None, None], 0.0)
    shape = key.shape[0], key.shape[2], key.shape[3], value.shape[3]
    state = key.new_zeros(shape) if initial_state is None else initial_state.to(key)
    kept: list[Tensor] = []
    for step in range(key.shape[1]):
        state = decay[:, step, ..., None] * state + key[:, step, ..., None] * value[:, step, :, None]
        if (step + 1) % every == 0:
            kept.append(state)
        if len(kept) == KEPT_AT_ONCE:
            yield torch.stack(kept)
            kept = []
    if kept:
        yield torch.stack(kept)
