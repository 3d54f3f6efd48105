"""The two Mamba families that the tests of the models with a state size per layer run over."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model, MambaConfig, MambaForCausalLM, MambaModel

from hf_compressm.models import (
    CompreSSMamba2Config,
    CompreSSMamba2ForCausalLM,
    CompreSSMamba2Model,
    CompreSSMambaConfig,
    CompreSSMambaForCausalLM,
    CompreSSMambaModel,
)
from tests.models.cases import VOCAB_SIZE, perturbed


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "state_size": 6,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class MambaFamily:
    name: str
    stock_config: type
    stock_model: type
    stock_causal: type
    config_class: type
    model_class: type
    causal_class: type
    variant: dict[str, Any] = field(default_factory=dict)
    own_sizes: dict[str, dict[str, int]] = field(default_factory=dict)

    def config(self, **kwargs: Any) -> Any:
        return self.config_class(**{**SIZES, **self.variant, **kwargs})

    def stock(self, **kwargs: Any) -> nn.Module:
        """The stock language model, none of whose parameters is what its initialisation would make it again."""
        config = self.stock_config(**{**SIZES, **self.variant, **kwargs})
        return perturbed(self.stock_causal(config), 0.3).eval()

    def causal_model(self, **kwargs: Any) -> nn.Module:
        """A language model with sizes per layer, perturbed as `stock` is."""
        config = self.config(**{"per_layer_config": self.own_sizes, **kwargs})
        return perturbed(self.causal_class(config), 0.3).eval()


MAMBA = MambaFamily(
    "mamba",
    MambaConfig,
    MambaModel,
    MambaForCausalLM,
    CompreSSMambaConfig,
    CompreSSMambaModel,
    CompreSSMambaForCausalLM,
    own_sizes={"0": {"state_size": 3}, "2": {"state_size": 1}},
)
# The first layer projects, the second is the stock one, the third is smaller without a projection.
MAMBA2 = MambaFamily(
    "mamba2",
    Mamba2Config,
    Mamba2Model,
    Mamba2ForCausalLM,
    CompreSSMamba2Config,
    CompreSSMamba2Model,
    CompreSSMamba2ForCausalLM,
    {"num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4},
    {"0": {"state_size": 3, "conv_state_size": 5}, "2": {"state_size": 1}},
)
MAMBA_FAMILIES = (MAMBA, MAMBA2)


def left_padded(rows: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first tokens of each row, moved to the right end, and the mask of what is not padding."""
    total = rows.shape[1]
    padded = torch.stack([row.roll(total - length) for row, length in zip(rows, lengths, strict=True)])
    return padded, (torch.arange(total) >= total - torch.tensor(lengths)[:, None]).long()
