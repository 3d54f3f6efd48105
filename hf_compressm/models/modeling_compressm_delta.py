"""Delta nets whose queries and keys are projected onto fewer states behind their L2 norm.

    q~ = U q / |q|,  k~ = U k / |k|,  S_t = exp(g_t) (I - beta_t k~ k~^T) S_{t-1} + beta_t k~ v_t^T,  o_t = S_t^T q~ / sqrt(M)

Convolution, SiLU and norm are between q, k and their input projections, so U cannot be folded into these. Without it a
layer is the stock one. The recurrence is transformers' own, looked up in its file at every call: a kernel or a faster
function in its place runs here too.

Glossary:
    N             states of a key head
    M             channels of q and of k per key head before U; without U they are the states
    U             `state_proj`, one for each key head, (key heads, N, M)
    q, k, v       (batch, length, heads, channels of a head)
    beta, g       step and log decay, (batch, length, value heads)
"""

import copy
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.accelerate import force_accelerate_hooks

from .configuration_compressm_delta import CONFIG_KINDS, DeltaConfigKind, own_config_class
from .exporting_compressm_mamba import ExportedWithCode


class DeltaStates(nn.Module):
    """Base of layers: the stock one, or with a `state_proj` the one that projects queries and keys behind their norm.

    All attributes of the stock layer are those of M channels.

    Args:
        config: The configuration of this layer, `config.per_layer_config[layer_idx]`.
        layer_idx: Its index, under which a cache holds its state.
    """

    modeling: ClassVar[ModuleType]  # transformers' file with the stock layer
    rules: ClassVar[tuple[str, str]] = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    heads: ClassVar[str] = "num_k_heads"
    value_channels: ClassVar[str] = "head_v_dim"
    keeps_texts_apart: ClassVar[bool] = True  # whether the recurrence is told where packed texts begin
    state_proj: nn.Parameter | None

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        unprojected = copy.copy(config)
        if config.projection is not None and config.kind.added == config.kind.width_field:
            setattr(unprojected, config.kind.size_field, config.projection[1])
        super().__init__(unprojected, layer_idx)
        self.register_parameter("state_proj", None)
        if config.projection is not None:
            self.state_proj = nn.Parameter(torch.empty(getattr(self, self.heads), *config.projection))
            if self.state_proj.device.type != "meta":
                self.init_projection()

    @torch.no_grad()
    def init_projection(self) -> None:
        """Make the projection pass on the first N of M channels."""
        if self.state_proj is not None:
            identity = torch.eye(*self.state_proj.shape[1:], device=self.state_proj.device)
            init.copy_(self.state_proj, identity.expand_as(self.state_proj))

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
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx, state_idx=0)
        mixed = self._convolve(mixed.transpose(1, 2), cache, **kwargs).transpose(1, 2)
        heads, _, channels = self.state_proj.shape
        q, k, v = mixed.split([heads * channels, heads * channels, mixed.shape[-1] - 2 * heads * channels], dim=-1)
        scale = (self.state_proj.shape[1] / channels) ** 0.5  # the recurrence divides by sqrt(N)
        q, k = (self._project(vectors.unflatten(-1, (heads, channels))) for vectors in (q, k))
        v = v.unflatten(-1, (-1, getattr(self, self.value_channels)))
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

    def _convolve(self, mixed: Tensor, cache: Cache | None, **kwargs: Any) -> Tensor:
        """Causal convolution and activation of `(batch, channels, length)`; reads and updates the cache."""
        weight, bias, length = self.conv1d.weight.squeeze(1), self.conv1d.bias, mixed.shape[-1]
        past = None if cache is None else cache.get_conv_state(self.layer_idx, state_idx=0)
        if past is not None and length == 1 and not cache.is_recording_past(self.layer_idx):
            return self.modeling.causal_conv1d_update(mixed, past, weight, bias, self.activation)
        if cache is not None:  # returns earlier steps together with these
            mixed = cache.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        mixed = self.modeling.causal_conv1d_fn(mixed, weight, bias, activation=self.activation, **kwargs)
        return mixed[..., -length:]

    def _project(self, vectors: Tensor) -> Tensor:
        """Queries or keys of length 1 on the states, `(batch, length, key heads, N)`."""
        unit = self.modeling.l2norm(vectors.float(), dim=-1, eps=1e-6)
        return torch.einsum("blhm,hnm->blhn", unit, self.state_proj.float())

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

    def extra_repr(self) -> str:
        """The size of the state, for `print(model)`."""
        return "" if self.state_proj is None else f"states={self.state_proj.shape[1]}"


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
    value_channels = "head_dim"
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


class DeltaStatesModel(ExportedWithCode):
    """Base of models: the stock one, in which every delta net is one of this package, with the sizes of its layer.

    Args:
        config: A configuration; `config.per_layer_config[i]` is that of layer i.

    Raises:
        ValueError: When a size of the configuration is out of range.
    """

    own_parts: ClassVar[Mapping[type, type]]  # classes of this package by the stock ones

    def __init__(self, config: PreTrainedConfig):
        config.validate_architecture()
        sizes = config.to_dict()["per_layer_config"] if config.is_heterogeneous else None
        config.per_layer_config = None  # the stock model is built with one size
        try:
            super().__init__(config)
        finally:
            config.per_layer_config = sizes
        for name, part in list(self.named_modules()):
            own = self.own_parts.get(type(part))
            if own is not None and issubclass(own, DeltaStates):
                place, _, attribute = name.rpartition(".")
                layer = own(config.per_layer_config[part.layer_idx], part.layer_idx)
                setattr(self.get_submodule(place), attribute, layer)
            elif own is not None:
                part.__class__ = own
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeltaStates):
            module.init_projection()


@dataclass(frozen=True)
class DeltaKind:
    """One model type.

    Attributes:
        config: what is said of its configuration.
        states: what its layer adds to the stock one.
        layer: the name of the stock layer.
        model: the name of the stock backbone.
        causal: the name of the stock language model, if there is one.
        place: the attribute of a block that holds the layer.
    """

    config: DeltaConfigKind
    states: type[DeltaStates]
    layer: str
    model: str
    causal: str = ""
    place: str = "linear_attn"

    @property
    def is_known(self) -> bool:
        """Whether this version of transformers has the model type."""
        return importlib.util.find_spec(f"transformers.models.{self.config.folder}") is not None

    @property
    def modeling(self) -> ModuleType:
        """The file of transformers with its classes."""
        return importlib.import_module(f"transformers.models.{self.config.folder}.modeling_{self.config.folder}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stock classes that have a counterpart."""
        return tuple(name for name in (self.layer, self.model, self.causal) if name)

    def make(self, name: str) -> type:
        """The counterpart of the stock class of that name."""
        stock = getattr(self.modeling, name)
        space = {"__module__": __name__, "__doc__": f"The counterpart of transformers' `{name}`."}
        if name == self.layer:
            space |= {"modeling": self.modeling}
            if hasattr(stock, "kernel_layer_name"):  # by which another forward could take the place of this one
                space["kernel_layer_name"] = f"CompreSSM{name}"
            return type(f"CompreSSM{name}", (self.states, stock), space)
        file = __name__.rpartition(".")[2]
        space |= {
            "config_class": own_config_class(self.config),
            "_exported_classes": {
                auto: f"{file}.CompreSSM{each}"
                for auto, each in (("AutoModel", self.model), ("AutoModelForCausalLM", self.causal))
                if each
            },
        }
        inner = [self.layer] if name == self.model else [self.layer, self.model]
        space["own_parts"] = {getattr(self.modeling, each): own_class(f"CompreSSM{each}") for each in inner}
        return type(f"CompreSSM{name}", (DeltaStatesModel, stock), space)


_CONFIGS = {kind.folder: kind for kind in CONFIG_KINDS}
DELTA_KINDS = (
    DeltaKind(
        _CONFIGS["qwen3_next"],
        InterleavedDeltaStates,
        "Qwen3NextGatedDeltaNet",
        "Qwen3NextModel",
        "Qwen3NextForCausalLM",
    ),
    DeltaKind(_CONFIGS["qwen3_5"], SplitDeltaStates, "Qwen3_5GatedDeltaNet", "Qwen3_5TextModel", "Qwen3_5ForCausalLM"),
    DeltaKind(
        _CONFIGS["qwen3_5_moe"],
        SplitDeltaStates,
        "Qwen3_5MoeGatedDeltaNet",
        "Qwen3_5MoeTextModel",
        "Qwen3_5MoeForCausalLM",
    ),
    DeltaKind(
        _CONFIGS["qwen4_exp"], SplitDeltaStates, "Qwen4ExpTextGatedDeltaNet", "Qwen4ExpTextModel", "Qwen4ExpForCausalLM"
    ),
    DeltaKind(
        _CONFIGS["lara_mini"], SplitDeltaStates, "LaraMiniGatedDeltaNet", "LaraMiniModel", "LaraMiniForCausalLM"
    ),
    DeltaKind(
        _CONFIGS["olmo_hybrid"],
        SeparateDeltaStates,
        "OlmoHybridGatedDeltaNet",
        "OlmoHybridModel",
        "OlmoHybridForCausalLM",
    ),
    DeltaKind(
        _CONFIGS["kimi_linear"],
        KimiDeltaStates,
        "KimiLinearDeltaAttention",
        "KimiLinearModel",
        "KimiLinearForCausalLM",
        "self_attn",
    ),
    DeltaKind(
        _CONFIGS["bailing_hybrid"],
        KimiDeltaStates,
        "BailingHybridDeltaAttention",
        "BailingHybridModel",
        "BailingHybridForCausalLM",
        "self_attn",
    ),
    DeltaKind(
        _CONFIGS["glm5_next"], KimiDeltaStates, "Glm5NextTextLinearAttention", "Glm5NextTextModel", place="self_attn"
    ),
)


def own_class(name: str) -> type:
    """A class of this file; it is made when it is asked for first."""
    if name not in globals():
        for kind in DELTA_KINDS:
            for stock in kind.names:
                if name == f"CompreSSM{stock}":
                    globals()[name] = kind.make(stock)
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __getattr__(name: str) -> type:
    return own_class(name)


__all__ = ["DELTA_KINDS", "DeltaKind", "DeltaStates", "DeltaStatesModel", "own_class"]
