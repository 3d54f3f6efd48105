"""Heads that S5 and LRU models share: sequence classification and causal language modelling with generation.

Glossary:
    H  hidden size, features between layers
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import SequenceClassifierOutput

from .cache_diagonal_ssm import CachedOutput
from .configuration_diagonal_ssm import DiagonalSSMConfig
from .modeling_diagonal_ssm import DiagonalSSMModel, DiagonalSSMPreTrainedModel


@dataclass
class DiagonalSSMCausalLMOutput(CachedOutput):
    """Output of the causal language models.

    Args:
        loss: Next-token cross entropy, with `labels`.
        logits: `(batch, length, vocab_size)`, before the softmax.
        cache: One recurrent state per layer; pass it back with the tokens that follow.
        hidden_states: The encoded input and each block's output, with `output_hidden_states=True`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class DiagonalSSMForSequenceClassification(DiagonalSSMPreTrainedModel):
    """Backbone, pooling over positions and a linear head, for regression, one label or several."""

    backbone_class: ClassVar[type[DiagonalSSMModel]] = DiagonalSSMModel
    # The losses here are means over the batch, so `Trainer` has to average gradient accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: DiagonalSSMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.backbone_class(config)
        self.main_input_name = self.backbone.main_input_name
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | SequenceClassifierOutput:
        """Classify sequences; arguments as in [`DiagonalSSMModel`].

        Args:
            input_ids: Tokens `(batch, length)`.
            attention_mask: `(batch, length)`, 0 at padding, on either side.
            inputs_embeds: Encoded input `(batch, length, H)`.
            input_values: Continuous frames `(batch, length, input_size)`.
            labels: Class indices `(batch,)`; targets `(batch,)` or `(batch, num_labels)` for regression; 0 or 1
                `(batch, num_labels)`, floating point, for several labels. `config.problem_type` decides, or else
                `num_labels` and the type of `labels`.
            output_hidden_states: Whether to return the encoded input and every block's output.
            return_dict: Whether to return a `SequenceClassifierOutput` rather than a tuple.
            use_cache: Accepted and not used: a classifier returns no states.
            **kwargs: As in [`DiagonalSSMModel`]. Packed texts are kept apart, and pooled over their row.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(self._pool(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return output if return_dict else output.to_tuple()

    def _pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Reduce `(batch, length, H)` to `(batch, H)` by `config.pooling`, over positions that are not padding."""
        if attention_mask is None:
            return hidden_states.mean(dim=1) if self.config.pooling == "mean" else hidden_states[:, -1]
        mask = attention_mask.to(hidden_states.device).bool()
        if self.config.pooling == "mean":
            total = hidden_states.masked_fill(~mask[..., None], 0.0).sum(dim=1)
            return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(dim=1)  # (batch,)
        return hidden_states[torch.arange(len(last), device=mask.device), last]


class DiagonalSSMForCausalLM(DiagonalSSMPreTrainedModel, GenerationMixin):
    """Backbone and language-modelling head; `generate()` costs the same for every token."""

    backbone_class: ClassVar[type[DiagonalSSMModel]] = DiagonalSSMModel
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: DiagonalSSMConfig):
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError(f"`config.vocab_size` is None; {type(self).__name__} reads and writes tokens, so set it.")
        self.backbone = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Before transformers 5.24 `generate()` would prepare one under the name `past_key_values` and ask it for its
        # length in tokens. Without it, the first forward pass builds the cache, and `generate()` passes it on.
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one step: the prompt with its mask first, then single tokens, which are never padding."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if kwargs.get("use_cache") and not is_first_iteration:
            model_inputs["attention_mask"] = None
        return model_inputs

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache_params: Cache | None = None,
        position_ids: torch.LongTensor | None = None,
        seq_idx: torch.IntTensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | DiagonalSSMCausalLMOutput:
        """Predict next tokens; arguments as in [`DiagonalSSMModel`].

        Args:
            input_ids: Tokens `(batch, length)`.
            attention_mask: `(batch, length)`, 0 at padding, on either side.
            inputs_embeds: Encoded input `(batch, length, H)`, instead of `input_ids`.
            cache: States after the tokens that came before; `input_ids` then holds only those that follow.
            labels: `(batch, length)`, shifted inside the model; positions with -100 are ignored.
            use_cache: Whether to return the states; by default `config.use_cache` outside training.
            output_hidden_states: Whether to return the encoded input and every block's output.
            return_dict: Whether to return a [`DiagonalSSMCausalLMOutput`] rather than a tuple.
            logits_to_keep: Compute the logits of this many last positions only (0: all), or of these positions.
            cache_params: An older name of `cache`, under which `generate()` passes it before transformers 5.24.
            position_ids: As in [`DiagonalSSMModel`]; where they restart, another text begins in the row.
            seq_idx: As in [`DiagonalSSMModel`].
            **kwargs: As in [`DiagonalSSMModel`], and passed to the loss, which reads `num_items_in_batch`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_params=cache_params,
            position_ids=position_ids,
            seq_idx=seq_idx,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = DiagonalSSMCausalLMOutput(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )
        return output if return_dict else output.to_tuple()
