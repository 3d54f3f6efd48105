"""Hugging Face models: S5, LRU, and Mamba, Mamba-2 and linear attention with a state size per layer.

They are registered with the Auto classes under `s5`, `lru`, `compressm_mamba`, `compressm_mamba2` and the model types
of linear attention with `compressm_` before them. This folder is flat, since its files are copied one by one beside
saved models, as custom code.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from . import configuration_compressm_linear_attention as _attention_configs
from . import modeling_compressm_linear_attention as _attention_models
from .adopting import adopt, adopt_config, own_class, own_config_class, release, stock_class
from .configuration_compressm_mamba import CompreSSMambaConfig
from .configuration_compressm_mamba2 import CompreSSMamba2Config
from .configuration_diagonal_ssm import DiagonalSSMConfig
from .configuration_lru import LRUConfig
from .configuration_s5 import S5Config
from .modeling_compressm_linear_attention import MODEL_KINDS
from .modeling_compressm_linear_attention import own_class as _own_attention_class
from .modeling_compressm_mamba import CompreSSMambaForCausalLM, CompreSSMambaModel
from .modeling_compressm_mamba2 import CompreSSMamba2ForCausalLM, CompreSSMamba2Mixer, CompreSSMamba2Model
from .modeling_lru import LRUForCausalLM, LRUForSequenceClassification, LRULayer, LRUModel
from .modeling_s5 import S5ForCausalLM, S5ForSequenceClassification, S5Layer, S5Model


__all__ = [
    "CompreSSMamba2Config",
    "CompreSSMamba2ForCausalLM",
    "CompreSSMamba2Mixer",
    "CompreSSMamba2Model",
    "CompreSSMambaConfig",
    "CompreSSMambaForCausalLM",
    "CompreSSMambaModel",
    "DiagonalSSMConfig",
    "LRUConfig",
    "LRUForCausalLM",
    "LRUForSequenceClassification",
    "LRULayer",
    "LRUModel",
    "S5Config",
    "S5ForCausalLM",
    "S5ForSequenceClassification",
    "S5Layer",
    "S5Model",
    "adopt",
    "adopt_config",
    "own_class",
    "own_config_class",
    "release",
    "stock_class",
]

# `register_for_auto_class` makes `save_pretrained` copy the code beside the weights.
_MODELS: dict[Any, list[Any]] = {
    AutoModel: [S5Model, LRUModel, CompreSSMambaModel, CompreSSMamba2Model],
    AutoModelForCausalLM: [S5ForCausalLM, LRUForCausalLM, CompreSSMambaForCausalLM, CompreSSMamba2ForCausalLM],
    AutoModelForImageTextToText: [],
    AutoModelForSequenceClassification: [S5ForSequenceClassification, LRUForSequenceClassification],
}
for _kind in MODEL_KINDS:
    if _kind.is_known:
        _MODELS[AutoModel] += [_own_attention_class(f"CompreSSM{name}") for name in (_kind.model, *_kind.wholes[:1])]
        _MODELS[AutoModelForCausalLM] += [_own_attention_class(f"CompreSSM{name}") for name in _kind.text_models[1:]]
        _MODELS[AutoModelForImageTextToText] += [_own_attention_class(f"CompreSSM{name}") for name in _kind.wholes[1:]]

for _config_class in {_model.config_class: None for _models in _MODELS.values() for _model in _models}:
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _config_class.register_for_auto_class()

for _auto_class, _models in _MODELS.items():
    for _model_class in _models:
        _auto_class.register(_model_class.config_class, _model_class, exist_ok=True)
        _model_class.register_for_auto_class(_auto_class.__name__)


def __getattr__(name: str) -> Any:
    """The classes of linear attention, which are made when they are asked for."""
    for module in (_attention_configs, _attention_models):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
