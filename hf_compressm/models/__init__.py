"""S5 and LRU in the shape of Hugging Face models, registered with the Auto classes under `s5` and `lru`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_diagonal_ssm import DiagonalSSMConfig
from .configuration_lru import LRUConfig
from .configuration_s5 import S5Config
from .modeling_lru import LRUForCausalLM, LRUForSequenceClassification, LRULayer, LRUModel
from .modeling_s5 import S5ForCausalLM, S5ForSequenceClassification, S5Layer, S5Model


__all__ = [
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
]

# `register_for_auto_class` makes `save_pretrained` copy the code beside the weights.
for _config_class, _model_classes in (
    (S5Config, (S5Model, S5ForSequenceClassification, S5ForCausalLM)),
    (LRUConfig, (LRUModel, LRUForSequenceClassification, LRUForCausalLM)),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _config_class.register_for_auto_class()
    for _auto_class, _model_class in zip(
        (AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM), _model_classes, strict=True
    ):
        _auto_class.register(_config_class, _model_class, exist_ok=True)
        _model_class.register_for_auto_class(_auto_class.__name__)
