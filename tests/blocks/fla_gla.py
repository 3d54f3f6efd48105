"""Gated linear attention of flash-linear-attention 0.6: `GatedLinearAttention`, and its kernel.

Heads may share keys, values and decays; the layer repeats these before its recurrence. A layer returns its output with
two more values.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fla_delta import Outputs, ShortConvolution, repadded, unpadded
from .parts import RMSNormGated


NORMALIZER = 16
"""What divides the logarithm of the decay."""


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The kernel: every state decays by itself, and nothing is erased."""
    starts = {0} if cu_seqlens is None else set(cu_seqlens.tolist())
    state, found = q.new_zeros(q.shape[0], *k.shape[2:], v.shape[-1]), []
    for step in range(q.shape[1]):
        state = torch.zeros_like(state) if step in starts else state
        state = g[:, step].exp()[..., None] * state + k[:, step, :, :, None] * v[:, step, :, None]
        found.append((q[:, step, :, :, None] * state).sum(dim=2) / q.shape[-1] ** 0.5)
    return torch.stack(found, dim=1), None


class FlaGatedLinearAttention(nn.Module):
    """Names and layout of `fla.layers.GatedLinearAttention`."""

    def __init__(
        self,
        hidden_size: int,
        expand_k: float = 0.5,
        expand_v: float = 2.0,
        num_heads: int = 2,
        num_kv_heads: int | None = None,
        feature_map: Callable[[Tensor], Tensor] | None = None,
        use_short_conv: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size, self.expand_k, self.expand_v, self.num_heads = hidden_size, expand_k, expand_v, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_groups, self.layer_idx = num_heads // self.num_kv_heads, None
        self.feature_map_fn, self.use_short_conv = feature_map, use_short_conv
        self.key_dim, self.value_dim = round(hidden_size * expand_k), round(hidden_size * expand_v)
        self.key_dim_per_group = self.key_dim // self.num_kv_groups
        self.value_dim_per_group = self.value_dim // self.num_kv_groups
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads
        for name, width in zip("qkv", (self.key_dim, self.key_dim_per_group, self.value_dim_per_group), strict=True):
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, width, bias=False))
            if use_short_conv:
                setattr(self, f"{name}_conv1d", ShortConvolution(width))
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, NORMALIZER, bias=False), nn.Linear(NORMALIZER, self.key_dim_per_group)
        )
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.g_norm_swish_gate = RMSNormGated(self.head_v_dim)

    def heads(self, name: str, hidden: Tensor, width: int) -> Tensor:
        x = getattr(self, f"{name}_proj")(hidden)
        x = getattr(self, f"{name}_conv1d")(x) if self.use_short_conv and name != "gk" else x
        x = x.unflatten(-1, (-1, width))
        return x.repeat_interleave(self.num_heads // x.shape[2], dim=2)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Outputs:
        hidden, texts = unpadded(hidden, attention_mask)
        q, k, gk = (self.heads(name, hidden, self.head_k_dim) for name in ("q", "k", "gk"))
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        v, g = self.heads("v", hidden, self.head_v_dim), F.logsigmoid(gk) / NORMALIZER
        o, _ = chunk_gla(q=q, k=k, v=v, g=g, state_v_first=True, cu_seqlens=texts)
        o = self.g_norm_swish_gate(o, self.g_proj(hidden).unflatten(-1, (-1, self.head_v_dim)))
        return repadded(self.o_proj(o.flatten(2)), attention_mask), None, past_key_values
