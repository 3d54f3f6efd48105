"""Layers of linear attention whose queries and keys are projected onto fewer states.

Delta nets project behind the L2 norm, and lightning attention behind the SiLU:

    q~ = U q / |q|,  k~ = U k / |k|,  S_t = exp(g_t) (I - beta_t k~ k~^T) S_{t-1} + beta_t k~ v_t^T
    q~ = C_proj q,   k~ = B_proj k,   S_t = lambda S_{t-1} + k~ v_t^T

A value head reads `S_t^T q~`, in delta nets divided by sqrt(M).

Norm and activation are between q, k and their input projections, so the matrices cannot be folded into these. The
recurrence is a function of transformers, looked up in its file at every call: a kernel or a faster function in its
place runs here too.

Glossary:
    N             states of a key head
    M             channels of q and of k per key head before the projection; without one they are the states
    U             `state_proj`, one for each key head, (key heads, N, M); `B_proj` and `C_proj` likewise
    q, k, v       (batch, length, heads, channels of a head)
    beta, g       step and log decay, (batch, length, value heads)
"""

from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2 import modeling_mamba2

from .convolving_compressm import convolve, past_of


class ProjectingLayer(nn.Module):
    """Base of layers: what a layer has besides the stock one, whose attributes are those of M channels.

    Args:
        config: The configuration of this layer, `config.per_layer_config[layer_idx]`.
        layer_idx: Its index, under which a cache holds its state.
    """

    modeling: ClassVar[ModuleType]  # transformers' file with the stock layer
    projections: ClassVar[tuple[str, ...]] = ("state_proj",)
    heads: ClassVar[str] = "num_k_heads"
    channels: ClassVar[str] = "head_k_dim"

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config.unprojected, layer_idx)
        for name in self.projections:
            self.register_parameter(name, None)
            if config.projected_states is not None:
                shape = getattr(self, self.heads), config.projected_states, getattr(self, self.channels)
                setattr(self, name, nn.Parameter(torch.empty(shape)))
        if config.projected_states is not None and getattr(self, self.projections[0]).device.type != "meta":
            self.init_projections()

    @torch.no_grad()
    def init_projections(self) -> None:
        """Make the projections pass on the first N of M channels."""
        for weight in (getattr(self, name) for name in self.projections):
            if weight is not None:
                init.copy_(weight, torch.eye(*weight.shape[1:], device=weight.device).expand_as(weight))

    def extra_repr(self) -> str:
        """The size of the state, for `print(model)`."""
        weight = getattr(self, self.projections[0])
        return "" if weight is None else f"states={weight.shape[1]}"


def project(vectors: Tensor, weight: Tensor) -> Tensor:
    """Map `(batch, length, heads, M)` by one matrix per head, `weight` `(heads, N, M)`."""
    return torch.einsum("blhm,hnm->blhn", vectors, weight)


class DeltaStates(ProjectingLayer):
    """Base of delta nets: the stock layer, or with a `state_proj` the one that projects queries and keys."""

    rules: ClassVar[tuple[str, str]] = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    value_channels: ClassVar[str] = "head_v_dim"
    keeps_texts_apart: ClassVar[bool] = True  # whether the recurrence is told where packed texts begin
    state_proj: nn.Parameter | None

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        cache_params: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map `(batch, length, hidden_size)` to the same shape.

        The stock block passes its cache as `cache`, or before transformers 5.24 as `cache_params`.
        """
        cache = cache_params if cache is None else cache
        if self.state_proj is None:
            return super().forward(hidden_states, cache, attention_mask, **kwargs)
        return self._forward_projected(hidden_states, cache, attention_mask, **kwargs)

    @force_accelerate_hooks("conv1d")
    def _forward_projected(
        self, hidden_states: Tensor, cache: Cache | None, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        hidden_states = self.modeling.apply_mask_to_padding_states(hidden_states, attention_mask)
        mixed, gate, beta, g = self.inputs(hidden_states)
        past = past_of(cache, self.layer_idx)
        state = None if past is None else past.recurrent_states[0]
        mixed = convolve(self, self.modeling, mixed.transpose(1, 2), past, cache, **kwargs).transpose(1, 2)
        heads, _, channels = self.state_proj.shape
        q, k, v = mixed.split([heads * channels, heads * channels, mixed.shape[-1] - 2 * heads * channels], dim=-1)
        scale = (self.state_proj.shape[1] / channels) ** 0.5  # the recurrence divides by sqrt(N)
        q, k = (self._project(vectors.unflatten(-1, (heads, channels))) for vectors in (q, k))
        v = v.unflatten(-1, (-1, getattr(self, self.value_channels)))
        if v.shape[2] != heads:  # before transformers 5.24 the recurrence has as many keys as values
            q, k = (vectors.repeat_interleave(v.shape[2] // heads, dim=2) for vectors in (q, k))
        if self.keeps_texts_apart:
            kwargs["cu_seqlens"] = kwargs.pop("cu_seq_lens_q", None)
        rule = getattr(self.modeling, self.rules[state is not None and v.shape[1] == 1])
        read, state = rule(
            (q * scale).to(v.dtype),
            k.to(v.dtype),
            v,
            g=g,
            beta=beta,
            initial_state=state,
            output_final_state=cache is not None,
            use_qk_l2norm_in_kernel=False,
            **kwargs,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return self.outputs(read, gate)

    def _project(self, vectors: Tensor) -> Tensor:
        """Queries or keys of length 1 on the states, `(batch, length, key heads, N)`."""
        unit = self.modeling.l2norm(vectors.float(), dim=-1, eps=1e-6)
        return project(unit, self.state_proj.float())

    def inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The input of the convolution `(batch, length, channels)`, the gate, beta and g."""
        raise NotImplementedError

    def outputs(self, read: Tensor, gate: Tensor) -> Tensor:
        """The layer's output, from what its value heads read and the gate."""
        return self.out_proj(self._normalized(self.norm, read, gate))

    def _normalized(self, norm: nn.Module, read: Tensor, gate: Tensor) -> Tensor:
        """What all value heads read, `(batch, length, channels)`, after the gated norm of every head."""
        shape = read.shape
        return norm(read.reshape(-1, shape[-1]), gate.reshape(-1, shape[-1])).reshape(*shape[:2], -1)

    def log_decay(self, a: Tensor) -> Tensor:
        """g; in float32, since the rate may overflow in float16."""
        return -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)


class SplitDeltaStates(DeltaStates):
    """Layers with one projection for q, k and v."""

    def inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in the base class."""
        beta, g = self.in_proj_b(hidden_states).sigmoid(), self.log_decay(self.in_proj_a(hidden_states))
        return self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states), beta, g


class InterleavedDeltaStates(DeltaStates):
    """Layers with one projection for q, k, v and the gate, by key heads."""

    def inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in the base class."""
        q, k, v, gate, b, a = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        )
        mixed = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
        return mixed, gate, b.sigmoid(), self.log_decay(a)


class SeparateDeltaStates(DeltaStates):
    """Layers with a projection for each of q, k, v and the gate."""

    def inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in the base class."""
        mixed = torch.cat([project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        beta = self.b_proj(hidden_states).sigmoid() * (2.0 if self.allow_neg_eigval else 1.0)
        return mixed, self.g_proj(hidden_states), beta, self.log_decay(self.a_proj(hidden_states))

    def outputs(self, read: Tensor, gate: Tensor) -> Tensor:
        """As in the base class."""
        return self.o_proj(self._normalized(self.o_norm, read, gate))


class KimiDeltaStates(SeparateDeltaStates):
    """Layers with a decay for every state: U selects channels, and the forget gate has a row for each one that stays.

    After a cut U is trained as any parameter. The forget gate's bottleneck, and values and gates, have M channels.
    """

    rules = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    heads = "num_heads"
    channels = value_channels = "head_dim"
    keeps_texts_apart = False

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if self.state_proj is None:
            return
        gate, rows = self.forget_gate, self.num_heads * self.state_proj.shape[1]
        name = "f_b_proj" if hasattr(gate, "f_b_proj") else "f_proj"
        setattr(gate, name, nn.Linear(getattr(gate, name).in_features, rows, bias=False))
        gate.dt_bias = nn.Parameter(torch.empty(rows, dtype=gate.dt_bias.dtype))
        gate.head_dim, gate.qkv_dim = self.state_proj.shape[1], rows

    def inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in the base class."""
        mixed = torch.cat([project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        gate = self.g_proj(hidden_states) if hasattr(self, "g_proj") else self.g_b_proj(self.g_a_proj(hidden_states))
        return mixed, gate, self.b_proj(hidden_states).sigmoid(), self.forget_gate(hidden_states)


class LightningStates(ProjectingLayer):
    """Lightning attention, with `B_proj` and `C_proj` onto fewer states; with or without them as a Mamba-2 scan.

    One constant decay per head multiplies all states alike, so any projection of them commutes with the recurrence.
    """

    projections = ("B_proj", "C_proj")
    heads = "num_attention_heads"
    channels = "head_dim"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Map `(batch, length, hidden_size)` to the same shape; also the last state, `(batch, heads, N, M)`.

        The stock block passes its cache as `cache`, or before transformers 5.24 as `past_key_values`.
        """
        cache = past_key_values if cache is None else cache
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        qkv = self.modeling.apply_mask_to_padding_states(qkv, attention_mask)
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, -1)).chunk(3, dim=-1)
        if getattr(self, "B_proj", None) is not None:  # a stock layer that is measured has none
            q, k = project(q, self.C_proj), project(k, self.B_proj)
        state = None if cache is None else cache.get_linear_cache(self.layer_idx)
        read, state = (self._scan if state is None or q.shape[1] > 1 else self._step)(q, k, v, state)
        read = F.sigmoid(self.output_gate(hidden_states)) * self.norm(read.flatten(2))
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        return self.out_proj(read), state

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The recurrence over several steps."""
        read, state = modeling_mamba2.mamba2_chunk_scan(
            v,
            v.new_ones(v.shape[:3]),
            -self.slope_rate.flatten().float(),
            k,
            q,
            chunk_size=self.block_size,
            initial_states=None if state is None else state.mT,
            return_final_states=True,
        )
        return read.to(v.dtype), state.mT.to(v.dtype)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the recurrence."""
        q, k, v = (vectors.transpose(1, 2) for vectors in (q, k, v))  # (batch, heads, 1, channels)
        state = (torch.exp(-self.slope_rate) * state + k.mT @ v).to(v.dtype)
        return (q @ state).transpose(1, 2), state


__all__ = [
    "DeltaStates",
    "InterleavedDeltaStates",
    "KimiDeltaStates",
    "LightningStates",
    "ProjectingLayer",
    "SeparateDeltaStates",
    "SplitDeltaStates",
]
