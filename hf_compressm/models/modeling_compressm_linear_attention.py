"""Models with linear attention in which every layer has a state size of its own, and may project onto its states.

A model is transformers' own, in which the layers of linear attention are those of this package: `__init__` builds the
stock model and replaces them. Classes are made from a table, when they are asked for: each needs the file of its model
type.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .configuration_compressm_linear_attention import CONFIG_KINDS, ConfigKind, own_config_class
from .exporting_compressm_mamba import ExportedWithCode
from .layers_compressm_linear_attention import (
    InterleavedDeltaStates,
    KimiDeltaStates,
    LightningStates,
    ProjectingLayer,
    SeparateDeltaStates,
    SplitDeltaStates,
)


class LinearAttentionModel(ExportedWithCode):
    """Base of models: the stock one, with layers of linear attention of this package, each with its own size.

    Args:
        config: A configuration; its `per_layer_config[i]`, or that of its text model, is that of layer i.

    Raises:
        ValueError: When a size of the configuration is out of range.
    """

    own_parts: ClassVar[Mapping[type, type]]  # classes of this package by the stock ones

    def __init__(self, config: PreTrainedConfig):
        text = config.get_text_config()
        text.validate_architecture()
        sizes = text.to_dict()["per_layer_config"] if text.is_heterogeneous else None
        own_config = type(text)
        text.per_layer_config, text.__class__ = None, text.kind.stock_class(text.kind.stock)  # for a stock model
        try:
            super().__init__(config)
        finally:
            text.__class__, text.per_layer_config = own_config, sizes
        for name, part in list(self.named_modules()):
            own = self.own_parts.get(type(part))
            if own is not None and issubclass(own, ProjectingLayer):
                place, _, attribute = name.rpartition(".")
                layer = own(text.per_layer_config[part.layer_idx], part.layer_idx)
                setattr(self.get_submodule(place), attribute, layer)
            elif own is not None:
                part.__class__ = own
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProjectingLayer):
            module.init_projections()


@dataclass(frozen=True)
class ModelKind:
    """One model type.

    Attributes:
        config: what is said of its configuration.
        states: what its layer adds to the stock one.
        layer: the name of the stock layer.
        model: the name of the stock backbone.
        causal: the name of the stock language model, if there is one.
        wholes: the names of the stock models that see images too, with and without a head.
        place: the attribute of a block that holds the layer.
    """

    config: ConfigKind
    states: type[ProjectingLayer]
    layer: str
    model: str
    causal: str = ""
    place: str = "linear_attn"
    wholes: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether this version of transformers has the model type."""
        return importlib.util.find_spec(f"transformers.models.{self.config.folder}") is not None

    @property
    def modeling(self) -> ModuleType:
        """The file of transformers with its classes."""
        return importlib.import_module(f"transformers.models.{self.config.folder}.modeling_{self.config.folder}")

    @property
    def text_models(self) -> tuple[str, ...]:
        """The names of the stock backbone and language model."""
        return (self.model, self.causal) if self.causal else (self.model,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stock classes that have a counterpart."""
        return (self.layer, *self.text_models, *self.wholes)

    def make(self, name: str) -> Any:
        """The counterpart of the stock class of that name."""
        stock = getattr(self.modeling, name)
        space: dict[str, Any] = {"__module__": __name__, "__doc__": f"The counterpart of transformers' `{name}`."}
        if name == self.layer:
            space |= {"modeling": self.modeling}
            if hasattr(stock, "kernel_layer_name"):  # by which another forward could take the place of this one
                space["kernel_layer_name"] = f"CompreSSM{name}"
            return type(f"CompreSSM{name}", (self.states, stock), space)
        served = AUTO_CLASSES["whole" if name in self.wholes else "text"]
        models = self.wholes if name in self.wholes else self.text_models
        file = __name__.rpartition(".")[2]
        space["_exported_classes"] = {
            auto: f"{file}.CompreSSM{each}" for auto, each in zip(served, models, strict=False)
        }
        space["config_class"] = own_config_class(self.config.whole if name in self.wholes else self.config.stock)
        parts = [
            self.layer,
            *([] if name == self.model else [self.model]),
            *(models[:1] if name == models[-1] else []),
        ]
        parts = [each for each in parts if each != name]
        space["own_parts"] = {getattr(self.modeling, each): own_class(f"CompreSSM{each}") for each in parts}
        return type(f"CompreSSM{name}", (LinearAttentionModel, stock), space)


AUTO_CLASSES = {
    "text": ("AutoModel", "AutoModelForCausalLM"),
    "whole": ("AutoModel", "AutoModelForImageTextToText"),
}
"""Which Auto classes load backbones and models with a head."""
_CONFIGS = {kind.folder: kind for kind in CONFIG_KINDS}
MODEL_KINDS = (
    ModelKind(
        _CONFIGS["qwen3_next"],
        InterleavedDeltaStates,
        "Qwen3NextGatedDeltaNet",
        "Qwen3NextModel",
        "Qwen3NextForCausalLM",
    ),
    ModelKind(
        _CONFIGS["qwen3_5"],
        SplitDeltaStates,
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5TextModel",
        "Qwen3_5ForCausalLM",
        wholes=("Qwen3_5Model", "Qwen3_5ForConditionalGeneration"),
    ),
    ModelKind(
        _CONFIGS["qwen3_5_moe"],
        SplitDeltaStates,
        "Qwen3_5MoeGatedDeltaNet",
        "Qwen3_5MoeTextModel",
        "Qwen3_5MoeForCausalLM",
        wholes=("Qwen3_5MoeModel", "Qwen3_5MoeForConditionalGeneration"),
    ),
    ModelKind(
        _CONFIGS["qwen4_exp"],
        SplitDeltaStates,
        "Qwen4ExpTextGatedDeltaNet",
        "Qwen4ExpTextModel",
        "Qwen4ExpForCausalLM",
        wholes=("Qwen4ExpModel", "Qwen4ExpForConditionalGeneration"),
    ),
    ModelKind(
        _CONFIGS["lara_mini"], SplitDeltaStates, "LaraMiniGatedDeltaNet", "LaraMiniModel", "LaraMiniForCausalLM"
    ),
    ModelKind(
        _CONFIGS["olmo_hybrid"],
        SeparateDeltaStates,
        "OlmoHybridGatedDeltaNet",
        "OlmoHybridModel",
        "OlmoHybridForCausalLM",
    ),
    ModelKind(
        _CONFIGS["kimi_linear"],
        KimiDeltaStates,
        "KimiLinearDeltaAttention",
        "KimiLinearModel",
        "KimiLinearForCausalLM",
        "self_attn",
    ),
    ModelKind(
        _CONFIGS["bailing_hybrid"],
        KimiDeltaStates,
        "BailingHybridDeltaAttention",
        "BailingHybridModel",
        "BailingHybridForCausalLM",
        "self_attn",
    ),
    ModelKind(
        _CONFIGS["glm5_next"],
        KimiDeltaStates,
        "Glm5NextTextLinearAttention",
        "Glm5NextTextModel",
        place="self_attn",
        wholes=("Glm5NextModel", "Glm5NextForConditionalGeneration"),
    ),
    ModelKind(
        _CONFIGS["minimax"],
        LightningStates,
        "MiniMaxLightningAttention",
        "MiniMaxModel",
        "MiniMaxForCausalLM",
        "self_attn",
    ),
)


def own_class(name: str) -> Any:
    """A class of this file; it is made when it is asked for first."""
    if name not in globals():
        for kind in MODEL_KINDS:
            for stock in kind.names:
                if name == f"CompreSSM{stock}":
                    globals()[name] = kind.make(stock)
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __getattr__(name: str) -> Any:
    return own_class(name)


__all__ = ["MODEL_KINDS", "LinearAttentionModel", "ModelKind", "own_class"]
