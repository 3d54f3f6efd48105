"""Block and backbone that S5 and LRU models share.

Glossary:
    H      hidden size, features between layers
    slots  complex states that a layer stores and caches
    mask   True at positions that are not padding, (batch, length)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from .cache_diagonal_ssm import CachedOutput, one_cache, read_state, write_state
from .configuration_diagonal_ssm import DiagonalSSMConfig
from .layers_diagonal_ssm import BATCH_NORM_MOMENTUM, DiagonalSSMLayer, GatedActivation, MaskedBatchNorm
from .packing_diagonal_ssm import find_packed_texts


@dataclass
class DiagonalSSMOutput(CachedOutput):
    """Output of the backbones.

    Args:
        last_hidden_state: `(batch, length, H)`.
        cache: One recurrent state per layer; pass it back with the inputs that follow.
        hidden_states: The encoded input and each block's output, with `output_hidden_states=True`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class DiagonalSSMBlock(GradientCheckpointingLayer):
    """Norm, state-space layer, activation and gate, residual, in the order of the S5 reference's `SequenceLayer`.

    Args:
        config: The configuration of this layer, `config.per_layer_config[layer_idx]`.
        layer_idx: Its index, under which a cache holds its state.
    """

    layer_class: ClassVar[type[DiagonalSSMLayer]] = DiagonalSSMLayer

    def __init__(self, config: DiagonalSSMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.prenorm = config.prenorm
        self.norm: nn.Module
        if config.norm == "batch":
            self.norm = MaskedBatchNorm(config.hidden_size, eps=config.norm_epsilon, momentum=BATCH_NORM_MOMENTUM)
        else:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.ssm = self.layer_class(config)
        self.activation = GatedActivation(config)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """Map `(batch, length, H)` to the same shape; `mask` `(batch, length)` is True where there is no padding."""
        residual = hidden_states
        if self.prenorm:
            hidden_states = self._normalise(hidden_states, mask)
        if cache is None:
            hidden_states = self.ssm(hidden_states, mask=mask)
        else:
            state = read_state(cache, self.layer_idx, hidden_states.shape[0], self.ssm.slots)
            hidden_states, state = self.ssm(hidden_states, state, return_last_state=True, mask=mask)
            write_state(cache, self.layer_idx, state)
        hidden_states = residual + self.activation(hidden_states)
        return hidden_states if self.prenorm else self._normalise(hidden_states, mask)

    def _normalise(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.norm, MaskedBatchNorm):
            return self.norm(hidden_states, mask)
        return self.norm(hidden_states)


class DiagonalSSMPreTrainedModel(PreTrainedModel):
    """Initialisation and saving shared by the backbones and heads."""

    config_class = DiagonalSSMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _is_stateful = True
    # Which class of the exported file each Auto class loads; written to config.json beside the code.
    _exported_classes: ClassVar[Mapping[str, str]] = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DiagonalSSMLayer):
            module.init_weights()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code, so that the directory loads anywhere with `trust_remote_code=True`.

        Takes the arguments of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        if self.is_remote_code():
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **self._exported_classes}
        super().save_pretrained(*args, **kwargs)


class DiagonalSSMModel(DiagonalSSMPreTrainedModel):
    """Encoder and stack of blocks. Reads tokens, continuous frames or embeddings, returns hidden states."""

    block_class: ClassVar[type[DiagonalSSMBlock]] = DiagonalSSMBlock

    def __init__(self, config: DiagonalSSMConfig):
        super().__init__(config)
        if config.vocab_size is not None:
            self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.input_size is not None:
            self.encoder = nn.Linear(config.input_size, config.hidden_size)
            self.main_input_name = "input_values"
        self.layers = nn.ModuleList(
            self.block_class(layer_config, layer_idx) for layer_idx, layer_config in enumerate(config.per_layer_config)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The token embeddings, or None for a model of continuous input."""
        return getattr(self, "embeddings", None)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.embeddings = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_params: Cache | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.IntTensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | DiagonalSSMOutput:
        """Run encoder and blocks on exactly one of `input_ids`, `input_values` and `inputs_embeds`.

        Args:
            input_ids: Tokens `(batch, length)`.
            attention_mask: `(batch, length)`, 0 at padding, which may be on either side and never enters a state.
                With `cache` it may cover earlier steps too. After padding on the right, the returned cache has
                decayed for as many steps: pad on the left to continue from it.
            inputs_embeds: Encoded input `(batch, length, H)`.
            input_values: Continuous frames `(batch, length, input_size)`.
            cache: States after the steps that came before; updated in place. Gradients stop there.
            use_cache: Whether to return the states; by default `config.use_cache` outside training, and not under
                `torch.export`.
            output_hidden_states: Whether to return the encoded input and every block's output.
            return_dict: Whether to return a [`DiagonalSSMOutput`] rather than a tuple.
            cache_params: An older name of `cache`.
            position_ids: `(batch, length)` or `(1, length)`. Where they do not increase, another text begins in the
                row. Texts are kept apart, and no cache is returned. After a `cache`, positions are not looked at.
            seq_idx: `(batch, length)`, the index of the text that a position belongs to: the same, said outright.
            **kwargs: `cu_seq_lens_q` says it for a single row (`packing_diagonal_ssm.py`). Everything else that
                clients pass to any model (`token_type_ids`, `output_attentions`) has no meaning here and no effect.

        Raises:
            ValueError: When the input is not exactly one of the three, or mask, cache, texts and model do not fit it.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        hidden_states = self._encode(input_ids, input_values, inputs_embeds)
        cache = one_cache(cache, cache_params, kwargs.get("past_key_values"))
        mask = self._padding_mask(attention_mask, hidden_states, cache)
        position_ids = position_ids if cache is None else None  # those of a continuation begin no text
        packing = {"seq_idx": seq_idx, "cu_seq_lens_q": kwargs.get("cu_seq_lens_q"), "position_ids": position_ids}
        texts = find_packed_texts(hidden_states.shape[:2], mask, hidden_states.device, packing)
        if texts is not None:
            if cache is not None:
                raise ValueError("Got `cache` and rows of several texts; a cache continues one text in each row.")
            rows = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if mask is None else mask
            hidden_states, mask, use_cache = texts.apart(hidden_states), texts.apart(rows), False
        cache = self._prepare_cache(cache, use_cache)

        all_hidden_states: tuple[torch.Tensor, ...] = (hidden_states,)
        for block in self.layers:
            hidden_states = block(hidden_states, mask=mask, cache=cache)
            all_hidden_states += (hidden_states,)
        if texts is not None:
            all_hidden_states = tuple(texts.together(states) for states in all_hidden_states)
        output = DiagonalSSMOutput(
            last_hidden_state=all_hidden_states[-1],
            cache=cache,
            hidden_states=all_hidden_states if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()

    def _encode(
        self,
        input_ids: torch.Tensor | None,
        input_values: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        given = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"Got {' and '.join(names) or 'no input'}; pass exactly one of `input_ids`, `input_values` and "
                "`inputs_embeds`."
            )
        if inputs_embeds is not None:
            return inputs_embeds
        if input_ids is not None:
            if self.config.vocab_size is None:
                raise ValueError("Got `input_ids`, but `config.vocab_size` is None: this model does not read tokens.")
            return self.embeddings(input_ids)
        size = self.config.input_size
        if size is None:
            raise ValueError(
                "Got `input_values`, but `config.input_size` is None: this model reads no continuous input."
            )
        if input_values.ndim != 3 or input_values.shape[-1] != size:
            raise ValueError(
                f"`input_values` has shape {tuple(input_values.shape)}; it must be (batch, length, {size})."
            )
        return self.encoder(input_values.to(self.encoder.weight.dtype))

    def _padding_mask(
        self, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor | None:
        if attention_mask is None:
            return None
        batch_size, length = hidden_states.shape[:2]
        mask = attention_mask
        if cache is not None and mask.ndim == 2 and mask.shape[1] > length:
            mask = mask[:, -length:]
        if mask.shape != (batch_size, length):
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}; the input needs {(batch_size, length)}."
            )
        return mask.to(hidden_states.device).bool()

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        checkpointing = self.gradient_checkpointing and self.training
        if cache is not None and checkpointing:
            raise ValueError(
                "`cache` cannot be used with gradient checkpointing, which would run each step twice: call "
                "`model.eval()` or switch gradient checkpointing off first."
            )
        if use_cache is None:  # exported programs have no complex states unless they are requested
            use_cache = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
        if self.layers and self.layers[0].ssm.bidirectional:
            use_cache = False
        if cache is None and use_cache and not checkpointing:
            return DynamicCache(config=self.config)
        return cache
