"""The table of model families that every test in this folder runs over."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_compressm.models import (
    LRUConfig,
    LRUForCausalLM,
    LRUForSequenceClassification,
    LRULayer,
    LRUModel,
    S5Config,
    S5ForCausalLM,
    S5ForSequenceClassification,
    S5Layer,
    S5Model,
)


VOCAB_SIZE = 11
SIZES = {"hidden_size": 6, "state_size": 8, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Family:
    name: str
    config_class: type
    layer_class: type
    model_class: type
    classifier_class: type
    causal_class: type
    variant: dict[str, Any] = field(default_factory=dict)

    def config(self, **kwargs: Any) -> Any:
        return self.config_class(**{**SIZES, **self.variant, **kwargs})

    def layer(self, **kwargs: Any) -> Any:
        return self.layer_class(self.config(**kwargs))

    def causal_model(self, **kwargs: Any) -> Any:
        """A language model whose predictions differ from token to token; fresh ones are nearly constant."""
        model = self.causal_class(self.config(**{"vocab_size": VOCAB_SIZE, **kwargs}))
        return perturbed(model, 0.3).eval()


S5 = Family("s5", S5Config, S5Layer, S5Model, S5ForSequenceClassification, S5ForCausalLM)
S5_COMPLEX = Family(
    "s5-complex",
    S5Config,
    S5Layer,
    S5Model,
    S5ForSequenceClassification,
    S5ForCausalLM,
    {"conj_sym": False, "state_size": 7, "discretization": "bilinear", "clip_eigs": True, "prenorm": False},
)
LRU = Family("lru", LRUConfig, LRULayer, LRUModel, LRUForSequenceClassification, LRUForCausalLM)
FAMILIES = (S5, S5_COMPLEX, LRU)


def perturbed(module: nn.Module, scale: float = 0.05) -> nn.Module:
    """Moves every parameter and float buffer, so that none is what its initialisation would make it again.

    Eigenvalue parameters move little: a perturbed layer stays stable.
    """
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                is_eigenvalue = name.rpartition(".")[2] in ("nu_log", "Lambda_re", "Lambda_im", "log_step", "theta")
                noise = torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)
                tensor.add_(noise, alpha=0.01 if is_eigenvalue else scale)
    return module


def tokens(batch_size: int = 3, length: int = 9) -> torch.Tensor:
    """Token 0 is left out: `generate()` takes it for padding where it is named as such."""
    return torch.randint(1, VOCAB_SIZE, (batch_size, length))


def enable_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    """Switches gradient checkpointing on under the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
