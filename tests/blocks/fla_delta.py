"""Delta nets of flash-linear-attention 0.6: `GatedDeltaNet`, `DeltaNet` and `KimiDeltaAttention`, and their kernels.

Gates are handed over before their activations, as the originals do, and the recurrence takes queries as `q`. A layer
returns its output with two more values.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm.scans import delta_scan_reference

from .parts import RMSNormGated, step_bias


Outputs = tuple[Tensor, None, Any]


def _run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, normalizes: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, None]:
    if cu_seqlens is None:
        return delta_scan_reference(q, k, v, g, beta, use_qk_l2norm_in_kernel=normalizes)[0], None
    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        one = [None if each is None else each[:, start:end] for each in (q, k, v, g, beta)]
        parts.append(delta_scan_reference(*one, use_qk_l2norm_in_kernel=normalizes)[0])
    return torch.cat(parts, dim=1), None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The kernel of gated delta nets, with its gates inside."""
    if kwargs.get("use_gate_in_kernel"):
        g = -kwargs["A_log"].exp() * F.softplus(g + kwargs["dt_bias"])
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    return _run(q, k, v, g, beta, use_qk_l2norm_in_kernel, cu_seqlens)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The kernel of delta nets without decay."""
    return _run(q, k, v, None, beta, use_qk_l2norm_in_kernel, cu_seqlens)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The kernel of Kimi delta attention, with its gates inside."""
    g, rate = g + dt_bias.view(g.shape[2:]), A_log.exp()[:, None]
    g = lower_bound * torch.sigmoid(rate * g) if lower_bound is not None else -rate * F.softplus(g)
    return _run(q, k, v, g, beta.sigmoid(), True, cu_seqlens)


def unpadded(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Real tokens of all rows one after the other, with the places where texts begin."""
    if mask is None:
        return hidden, None
    ends = mask.sum(dim=1).cumsum(0)
    return hidden[mask.bool()][None], F.pad(ends, (1, 0))


def repadded(out: Tensor, mask: Tensor | None) -> Tensor:
    """The rows again, with 0 at padding."""
    if mask is None:
        return out
    whole = out.new_zeros(*mask.shape, out.shape[-1])
    whole[mask.bool()] = out[0]
    return whole


class ShortConvolution(nn.Conv1d):
    """Names of fla's causal convolution."""

    def __init__(self, hidden_size: int, kernel_size: int = 4) -> None:
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=True, padding=kernel_size - 1)
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x.mT)[..., : x.shape[1]].mT)


class _DeltaLayer(nn.Module):
    """What the three share: projections, convolutions, norm."""

    def __init__(self, hidden_size: int, use_short_conv: bool, conv_size: int = 4) -> None:
        super().__init__()
        self.hidden_size, self.use_short_conv, self.layer_idx = hidden_size, use_short_conv, None
        widths = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
        for name, width in widths.items():
            setattr(self, f"{name}_proj", nn.Linear(hidden_size, width, bias=False))
            if use_short_conv:
                setattr(self, f"{name}_conv1d", ShortConvolution(width, conv_size))
        self.o_norm = RMSNormGated(self.head_v_dim)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def heads(self, hidden: Tensor) -> list[Tensor]:
        found = []
        for name, width in (("q", self.head_k_dim), ("k", self.head_k_dim), ("v", self.head_v_dim)):
            x = getattr(self, f"{name}_proj")(hidden)
            x = getattr(self, f"{name}_conv1d")(x) if self.use_short_conv else F.silu(x)
            found.append(x.unflatten(-1, (-1, width)))
        return found


class FlaGatedDeltaNet(_DeltaLayer):
    """Names and layout of `fla.layers.GatedDeltaNet`."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        expand_v: float = 2.0,
        num_heads: int = 2,
        num_v_heads: int | None = None,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
    ) -> None:
        values = num_heads if num_v_heads is None else num_v_heads
        self.head_dim, self.expand_v, self.num_heads, self.num_v_heads = head_dim, expand_v, num_heads, values
        self.head_k_dim, self.head_v_dim = head_dim, int(head_dim * expand_v)
        self.key_dim, self.value_dim = num_heads * head_dim, values * self.head_v_dim
        self.allow_neg_eigval = allow_neg_eigval
        super().__init__(hidden_size, use_short_conv)
        self.a_proj = nn.Linear(hidden_size, values, bias=False)
        self.b_proj = nn.Linear(hidden_size, values, bias=False)
        self.A_log = nn.Parameter(torch.empty(values).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(step_bias(values))
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Outputs:
        hidden, texts = unpadded(hidden, attention_mask)
        q, k, v = self.heads(hidden)
        o, _ = chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=self.a_proj(hidden),
            beta=self.b_proj(hidden),
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            state_v_first=True,
            cu_seqlens=texts,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
        )
        o = self.o_norm(o, self.g_proj(hidden).unflatten(-1, (-1, self.head_v_dim)))
        return repadded(self.o_proj(o.flatten(2)), attention_mask), None, past_key_values


class FlaDeltaNet(_DeltaLayer):
    """Names and layout of `fla.layers.DeltaNet`."""

    def __init__(
        self,
        hidden_size: int,
        expand_k: float,
        expand_v: float = 1.0,
        num_heads: int = 2,
        use_short_conv: bool = True,
        qk_norm: str = "l2",
    ) -> None:
        self.expand_k, self.expand_v, self.num_heads, self.qk_norm = expand_k, expand_v, num_heads, qk_norm
        self.key_dim, self.value_dim = round(hidden_size * expand_k), round(hidden_size * expand_v)
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads
        super().__init__(hidden_size, use_short_conv)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Outputs:
        hidden, texts = unpadded(hidden, attention_mask)
        q, k, v = self.heads(hidden)
        if self.qk_norm == "sum":
            q, k = (F.normalize(each, p=1, dim=-1, eps=1e-6) for each in (q, k))
        beta = self.b_proj(hidden).sigmoid()
        o, _ = chunk_delta_rule(
            q=q, k=k, v=v, beta=beta, use_qk_l2norm_in_kernel=self.qk_norm == "l2", cu_seqlens=texts
        )
        return repadded(self.o_proj(self.o_norm(o).flatten(2)), attention_mask), None, past_key_values


class FlaKimiDeltaAttention(_DeltaLayer):
    """Names and layout of `fla.layers.KimiDeltaAttention`."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        expand_v: float = 1.0,
        num_heads: int = 2,
        num_v_heads: int | None = None,
        use_short_conv: bool = True,
        lower_bound: float | None = None,
    ) -> None:
        values = num_heads if num_v_heads is None else num_v_heads
        self.head_dim, self.expand_v, self.num_heads, self.num_v_heads = head_dim, expand_v, num_heads, values
        self.head_k_dim, self.head_v_dim = head_dim, int(head_dim * expand_v)
        self.key_dim, self.value_dim, self.gate_dim = num_heads * head_dim, values * self.head_v_dim, values * head_dim
        self.safe_gate, self.lower_bound = lower_bound is not None, lower_bound
        super().__init__(hidden_size, use_short_conv)
        width = self.head_v_dim
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, width, bias=False), nn.Linear(width, self.gate_dim, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, values, bias=False)
        self.A_log = nn.Parameter(torch.empty(values).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(step_bias(self.gate_dim))
        self.g_proj = nn.Sequential(nn.Linear(hidden_size, width, bias=False), nn.Linear(width, self.value_dim))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Outputs:
        hidden, texts = unpadded(hidden, attention_mask)
        q, k, v = self.heads(hidden)
        o, _ = chunk_kda(
            q=q,
            k=k,
            v=v,
            g=self.f_proj(hidden).unflatten(-1, (-1, self.head_k_dim)),
            beta=self.b_proj(hidden),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=self.safe_gate,
            lower_bound=self.lower_bound,
            state_v_first=True,
            cu_seqlens=texts,
        )
        o = self.o_norm(o, self.g_proj(hidden).unflatten(-1, (-1, self.head_v_dim)))
        return repadded(self.o_proj(o.flatten(2)), attention_mask), None, past_key_values
