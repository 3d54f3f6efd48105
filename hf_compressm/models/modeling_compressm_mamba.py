"""Mamba with a state size per layer: blocks that compute as transformers' own, each built from its own configuration.

With one size for all layers it is the stock model, parameter names included.
"""

from torch import nn
from transformers.generation import GenerationMixin
from transformers.models.mamba.modeling_mamba import (
    MambaBlock,
    MambaForCausalLM,
    MambaMixer,
    MambaModel,
    MambaRMSNorm,
)

from .configuration_compressm_mamba import CompreSSMambaConfig
from .exporting_compressm_mamba import ExportedWithCode
from .guarding_compressm_mamba import ReadsWeights


_EXPORTED_CLASSES = {
    "AutoModel": "modeling_compressm_mamba.CompreSSMambaModel",
    "AutoModelForCausalLM": "modeling_compressm_mamba.CompreSSMambaForCausalLM",
}


class CompreSSMambaMixer(ReadsWeights, MambaMixer):
    """The stock mixer, in which LoRA is refused where it is refused in stock models."""


class CompreSSMambaBlock(MambaBlock):
    """The stock block around a [`CompreSSMambaMixer`]."""

    def __init__(self, config: CompreSSMambaConfig, layer_idx: int):
        super(MambaBlock, self).__init__()  # skips the stock one, which would build the stock mixer
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = CompreSSMambaMixer(config, layer_idx=layer_idx, initialize_mixer_weights=False)


class CompreSSMambaModel(ExportedWithCode, MambaModel):
    """Embeddings and stack of Mamba blocks, each with the state size of its layer.

    Args:
        config: A configuration; `config.per_layer_config[i]` is that of layer i.

    Raises:
        ValueError: When a size of the configuration is out of range.
    """

    config_class = CompreSSMambaConfig
    _no_split_modules = ["CompreSSMambaBlock", "CompreSSMambaMixer"]
    _exported_classes = _EXPORTED_CLASSES

    def __init__(self, config: CompreSSMambaConfig):
        config.validate_architecture()
        # Skips MambaModel.__init__, which would build every layer from the one global size.
        super(MambaModel, self).__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            CompreSSMambaBlock(layer_config, layer_idx=layer_idx)
            for layer_idx, layer_config in enumerate(config.per_layer_config)
        )
        self.gradient_checkpointing = False
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self._register_load_state_dict_pre_hook(self.load_hook)
        self.post_init()


class CompreSSMambaForCausalLM(ExportedWithCode, MambaForCausalLM, GenerationMixin):
    """Backbone of [`CompreSSMambaModel`] and language-modelling head."""

    config_class = CompreSSMambaConfig
    _no_split_modules = ["CompreSSMambaBlock", "CompreSSMambaMixer"]
    _exported_classes = _EXPORTED_CLASSES

    def __init__(self, config: CompreSSMambaConfig):
        super(MambaForCausalLM, self).__init__(config)  # skips the stock one, which would build the stock backbone
        self.backbone = CompreSSMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["CompreSSMambaForCausalLM", "CompreSSMambaModel"]
