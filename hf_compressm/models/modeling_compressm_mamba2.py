"""Mamba-2 with a state size per layer, and with B and C projected onto the states after the convolution.

One decay per head multiplies all states alike, so any projection of the N states of a group commutes with the
recurrence: the best cut to fewer states is `B~ = B_proj B`, `C~ = C_proj C`. Convolution and SiLU are between B, C
and the input projection, so the two matrices cannot be folded into it. Without them it is the stock model.

Glossary:
    N             states of one head, `state_size`
    M             channels of B and of C per group that pass the convolution, `conv_state_size`; N without projection
    G, H, P       groups, heads, channels per head; the intermediate size is H P
    dt            time steps, before the bias and softplus, (batch, length, H)
    past          the layer's part of the cache if it has seen a token, else None
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Mixer,
    Mamba2Model,
    Mamba2PreTrainedModel,
    Mamba2RMSNorm,
)

from .configuration_compressm_mamba2 import CompreSSMamba2Config
from .convolving_compressm import convolve, past_of
from .exporting_compressm_mamba import ExportedWithCode
from .guarding_compressm_mamba import ReadsWeights


def project_groups(signal: Tensor, weight: Tensor) -> Tensor:
    """Map `(batch, length, G M)` by one matrix per group, `weight` `(G, N, M)`, to `(batch, length, G, N)`."""
    groups, _, channels = weight.shape
    if groups == 1:
        return nn.functional.linear(signal, weight[0]).unsqueeze(2)
    return torch.einsum("blgm,gnm->blgn", signal.unflatten(-1, (groups, channels)), weight)


class CompreSSMamba2Mixer(ReadsWeights, Mamba2Mixer):
    """The stock mixer, or with `conv_state_size` the one that projects B and C after the convolution.

    `B_proj` and `C_proj` are None, or parameters `(G, N, M)`; `ssm_state_size` is N, `conv_state_size` is M, and
    `conv_dim` is `H P + 2 G M`.

    Args:
        config: The configuration of this layer, `config.per_layer_config[layer_idx]`.
        layer_idx: Its index, under which a cache holds its state.
        initialize_mixer_weights: Whether to initialise weights at construction, as in the stock mixer.
    """

    B_proj: nn.Parameter | None
    C_proj: nn.Parameter | None

    def __init__(self, config: CompreSSMamba2Config, layer_idx: int, initialize_mixer_weights: bool = True):
        unprojected = copy.copy(config)
        unprojected.state_size = config.state_size if config.conv_state_size is None else config.conv_state_size
        super().__init__(unprojected, layer_idx, initialize_mixer_weights=initialize_mixer_weights)
        self.ssm_state_size = config.state_size
        if config.conv_state_size is None:
            self.register_parameter("B_proj", None)
            self.register_parameter("C_proj", None)
            return
        shape = self.n_groups, self.ssm_state_size, config.conv_state_size
        self.B_proj = nn.Parameter(torch.empty(shape))
        self.C_proj = nn.Parameter(torch.empty(shape))
        if initialize_mixer_weights and self.B_proj.device.type != "meta":
            self.init_projections()

    @property
    def conv_state_size(self) -> int:
        """Channels of B, and of C, per group in the convolution; without a projection, the number of states."""
        return self.ssm_state_size if self.B_proj is None else self.B_proj.shape[-1]

    @torch.no_grad()
    def init_projections(self) -> None:
        """Make the projections pass on the first N of M channels, as if a fresh layer had been cut to them."""
        for weight in (self.B_proj, self.C_proj):
            if weight is not None:
                init.copy_(weight, torch.eye(*weight.shape[1:], device=weight.device).expand_as(weight))

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        cache_params: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map `(batch, length, hidden_size)` to the same shape; see [`~transformers.Mamba2Model`] for the rest.

        The stock block passes its cache as `cache`, or before transformers 5.24 as `cache_params`.
        """
        cache = cache_params if cache is None else cache
        if self.B_proj is None:
            return super().forward(hidden_states, cache, attention_mask, **kwargs)
        return self._forward_projected(hidden_states, cache, attention_mask, **kwargs)

    @force_accelerate_hooks("conv1d")
    def _forward_projected(
        self, hidden_states: Tensor, cache: Cache | None, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        dtype = hidden_states.dtype
        past = past_of(cache, self.layer_idx)
        hidden_states = modeling_mamba2.apply_mask_to_padding_states(hidden_states, attention_mask)
        gate, x_B_C, dt = self.in_proj(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        x_B_C = convolve(self, modeling_mamba2, x_B_C.transpose(1, 2), past, cache, **kwargs).transpose(1, 2)
        x_B_C = modeling_mamba2.apply_mask_to_padding_states(x_B_C, attention_mask)
        channels = self.n_groups * self.conv_state_size
        x, B, C = x_B_C.split([self.intermediate_size, channels, channels], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = project_groups(B, self.B_proj), project_groups(C, self.C_proj)
        if past is not None and x.shape[1] == 1:
            y = self._step(x[:, 0], B[:, 0], C[:, 0], dt, past.recurrent_states[0], **kwargs)[:, None]
        else:
            y = self._scan(x, B, C, dt, past, cache, **kwargs)
        return self.out_proj(self.norm(y.flatten(2), gate).to(dtype))

    def _step(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor, **kwargs: Any) -> Tensor:
        """One step of the recurrence, `(batch, H, P)`; updates `state` `(batch, H, P, N)` in place."""
        A = -torch.exp(self.A_log.float())
        return modeling_mamba2.mamba2_selective_state_update(
            state,
            x,
            dt.transpose(1, 2).expand(-1, -1, self.head_dim),
            A[:, None, None].expand(-1, self.head_dim, self.ssm_state_size),
            B,
            C,
            self.D[:, None].expand(-1, self.head_dim),
            z=None,
            dt_bias=self.dt_bias[:, None].expand(-1, self.head_dim),
            dt_softplus=True,
            **kwargs,
        )

    def _scan(
        self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, past: Any, cache: Cache | None, **kwargs: Any
    ) -> Tensor:
        """The recurrence over `(batch, length, H, P)`; reads and updates the cache's state."""
        result = modeling_mamba2.mamba2_chunk_scan(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D,
            z=None,
            return_final_states=cache is not None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=None if past is None else past.recurrent_states[0],
            dt_limit=self.time_step_limit,
            **kwargs,
        )
        if cache is None:
            return result
        y, state = result
        cache.update_recurrent_state(state, layer_idx=self.layer_idx)
        return y

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"state_size={self.ssm_state_size}, conv_state_size={self.conv_state_size}"


class CompreSSMamba2Block(Mamba2Block):
    """The stock block around a [`CompreSSMamba2Mixer`]."""

    def __init__(self, config: CompreSSMamba2Config, layer_idx: int):
        super(Mamba2Block, self).__init__()  # skips the stock one, which would build the stock mixer
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = CompreSSMamba2Mixer(config, layer_idx=layer_idx, initialize_mixer_weights=False)


class CompreSSMamba2PreTrainedModel(ExportedWithCode, Mamba2PreTrainedModel):
    """Initialisation and saving shared by backbone and language model."""

    config_class = CompreSSMamba2Config
    _no_split_modules = ["CompreSSMamba2Block"]
    _exported_classes = {
        "AutoModel": "modeling_compressm_mamba2.CompreSSMamba2Model",
        "AutoModelForCausalLM": "modeling_compressm_mamba2.CompreSSMamba2ForCausalLM",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompreSSMamba2Mixer):
            module.init_projections()


class CompreSSMamba2Model(CompreSSMamba2PreTrainedModel, Mamba2Model):
    """Embeddings and stack of Mamba-2 blocks, each with the sizes of its layer.

    Args:
        config: A configuration; `config.per_layer_config[i]` is that of layer i.

    Raises:
        ValueError: When a size of the configuration is out of range.
    """

    def __init__(self, config: CompreSSMamba2Config):
        config.validate_architecture()
        # Skips Mamba2Model.__init__, which would build every layer from the one global size.
        super(Mamba2Model, self).__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            CompreSSMamba2Block(layer_config, layer_idx=layer_idx)
            for layer_idx, layer_config in enumerate(config.per_layer_config)
        )
        self.gradient_checkpointing = False
        self.norm_f = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self._register_load_state_dict_pre_hook(self.load_hook)
        self.post_init()


class CompreSSMamba2ForCausalLM(CompreSSMamba2PreTrainedModel, Mamba2ForCausalLM, GenerationMixin):
    """Backbone of [`CompreSSMamba2Model`] and language-modelling head."""

    def __init__(self, config: CompreSSMamba2Config):
        super(Mamba2ForCausalLM, self).__init__(config)  # skips the stock one, which would build the stock backbone
        self.backbone = CompreSSMamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["CompreSSMamba2ForCausalLM", "CompreSSMamba2Mixer", "CompreSSMamba2Model"]
