"""Moving a live stock model into this package's class, in place and without touching a tensor.

Stock and own classes hold the same modules, parameters and buffers, so only the class of the objects has to change.
Parameters keep their identity: optimizer, hooks and all references stay valid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as default
from typing import Any

from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model, MambaConfig, MambaForCausalLM, MambaModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block, Mamba2Mixer

from .configuration_compressm_linear_attention import own_config_class as own_attention_config
from .configuration_compressm_mamba import CompreSSMambaConfig
from .configuration_compressm_mamba2 import CompreSSMamba2Config
from .modeling_compressm_linear_attention import MODEL_KINDS, ModelKind
from .modeling_compressm_linear_attention import own_class as own_attention_class
from .modeling_compressm_mamba import (
    CompreSSMambaBlock,
    CompreSSMambaForCausalLM,
    CompreSSMambaMixer,
    CompreSSMambaModel,
)
from .modeling_compressm_mamba2 import (
    CompreSSMamba2Block,
    CompreSSMamba2ForCausalLM,
    CompreSSMamba2Mixer,
    CompreSSMamba2Model,
)


@dataclass(frozen=True)
class Counterparts:
    """The classes of one model type, each with the one of this package.

    Attributes:
        configs: its configurations, the one of the layers first.
        models: backbones, the one with the layers first, and models with a head.
        layer: its layers.
        place: the attribute of a block that holds the layer.
        block: its blocks; empty where this package needs none of its own.
        parameters: what an own layer has besides, which a stock one gets, without a value, when it is adopted.
        field: a field that the own configuration of the layers has besides.
    """

    configs: Mapping[type, type]
    models: Mapping[type[PreTrainedModel], type[PreTrainedModel]]
    layer: Mapping[type, type]
    place: str = "mixer"
    block: Mapping[type, type] = default(default_factory=dict)
    parameters: tuple[str, ...] = ()
    field: str = ""

    @property
    def classes(self) -> dict[type, type]:
        """All of them, by the stock class."""
        return {**self.models, **self.block, **self.layer}

    def own_layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of a model that are of this package."""
        return [part for part in model.modules() if type(part) in self.layer.values()]


def _of_linear_attention(kind: ModelKind) -> Counterparts:
    """The classes of a model type with linear attention."""
    pairs = {getattr(kind.modeling, name): own_attention_class(f"CompreSSM{name}") for name in kind.names}
    layer = getattr(kind.modeling, kind.layer)
    return Counterparts(
        {kind.config.stock_class(name): own_attention_config(name) for name in kind.config.names},
        {stock: own for stock, own in pairs.items() if stock is not layer},
        {layer: pairs[layer]},
        place=kind.place,
        parameters=kind.states.projections,
        field=kind.config.added,
    )


_COUNTERPARTS = (
    Counterparts(
        {MambaConfig: CompreSSMambaConfig},
        {MambaModel: CompreSSMambaModel, MambaForCausalLM: CompreSSMambaForCausalLM},
        {MambaMixer: CompreSSMambaMixer},
        block={MambaBlock: CompreSSMambaBlock},
    ),
    Counterparts(
        {Mamba2Config: CompreSSMamba2Config},
        {Mamba2Model: CompreSSMamba2Model, Mamba2ForCausalLM: CompreSSMamba2ForCausalLM},
        {Mamba2Mixer: CompreSSMamba2Mixer},
        block={Mamba2Block: CompreSSMamba2Block},
        parameters=("B_proj", "C_proj"),
        field="conv_state_size",
    ),
    *(_of_linear_attention(kind) for kind in MODEL_KINDS if kind.is_known),
)
_CLASSES: dict[type, type] = {stock: own for each in _COUNTERPARTS for stock, own in each.classes.items()}
_CONFIGS: dict[type, type] = {stock: own for each in _COUNTERPARTS for stock, own in each.configs.items()}


def own_class(stock_class: type) -> type | None:
    """This package's class for a stock model, block or layer class; an own class itself; None for others."""
    return stock_class if stock_class in _CLASSES.values() else _CLASSES.get(stock_class)


def stock_class(model_class: type) -> type:
    """The stock class of an own model class; any other class itself."""
    models = {own: stock for each in _COUNTERPARTS for stock, own in each.models.items()}
    return models.get(model_class, model_class)


def own_config_class(stock_class: type) -> type | None:
    """This package's class for a stock configuration class; an own class itself; None for others."""
    return stock_class if stock_class in _CONFIGS.values() else _CONFIGS.get(stock_class)


def adopt(model: nn.Module) -> None:
    """Turn a stock model, live and perhaps in training, into this package's class, in place.

    The model, its backbone and its layers change their class, and so does the one configuration that they share. No
    tensor moves; hooks, buffers, mode and generation configuration stay. The sizes stay those of the stock model,
    until the caller changes them layer by layer. A model of an own class is left as it is. Everything is checked
    before anything changes.

    Args:
        model: A backbone or language model of a class that has a counterpart here, not a subclass.

    Raises:
        ValueError: When the model is none of these, or a part of it is not as its class builds it.
    """
    if any(type(model) in each.models.values() for each in _COUNTERPARTS):
        return
    counterparts = next((each for each in _COUNTERPARTS if type(model) in each.models), None)
    if counterparts is None:
        known = ", ".join(stock.__name__ for each in _COUNTERPARTS for stock in each.models)
        raise ValueError(
            f"The model is a {type(model).__name__}, which has no counterpart here: only {known} can be adopted, "
            "and no subclasses. Pass the model without its wrapper, or keep the stock class with `compat='stock'`."
        )
    classes = counterparts.classes
    parts = {name: part for name, part in model.named_modules() if type(part) in classes}
    found = [getattr(part, "config", None) for part in model.modules()]
    configs = list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
    _check_parts(model, parts, counterparts)
    _check_configs(model, configs, counterparts)
    for config in configs:
        adopt_config(config)
    for part in parts.values():
        part.__class__ = classes[type(part)]
        if isinstance(part, PreTrainedModel):
            part._no_split_modules = set(type(part)._no_split_modules or ())  # its own copy of the class's set
            vars(part).pop("_weight_conversions", None)  # back to the names of the stock checkpoint
    for layer in counterparts.own_layers(model):
        for name in counterparts.parameters:
            layer.register_parameter(name, None)


def release(model: nn.Module) -> None:
    """Turn a model of an own class back into the stock one, in place: the inverse of `adopt`.

    This is needed to go back to a checkpoint from before the first cut into the own class. No tensor moves: the caller
    changes sizes that a stock model cannot have, and removes projections. A stock model is left as it is.
    """
    counterparts = next((each for each in _COUNTERPARTS if type(model) in each.models.values()), None)
    if counterparts is None:
        return
    stock_of = {own: stock for stock, own in counterparts.classes.items()}
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        release_config(config)
    for layer in counterparts.own_layers(model):
        for name in counterparts.parameters:
            if layer._parameters[name] is None:
                del layer._parameters[name]
    for part in model.modules():
        if type(part) in stock_of:
            part.__class__ = stock_of[type(part)]
            if isinstance(part, PreTrainedModel):
                part._no_split_modules = set(type(part)._no_split_modules or ())


def release_config(config: PreTrainedConfig) -> None:
    """Turn the configuration of an own class back into the stock one, in place; leave others alone."""
    for each in _COUNTERPARTS:
        for stock, own in each.configs.items():
            if type(config) is own:
                config.__class__ = stock
                vars(config).pop(each.field, None)


def adopt_config(config: PreTrainedConfig) -> None:
    """Turn a stock configuration into this package's class, in place; leave others alone."""
    for each in _COUNTERPARTS:
        for place, (stock, own) in enumerate(each.configs.items()):
            if type(config) is stock:
                config.__class__ = own
                vars(config).pop("model_type", None)  # which a loaded configuration repeats on the instance
                if each.field and place == 0:
                    setattr(config, each.field, None)


def _check_parts(model: PreTrainedModel, parts: Mapping[str, nn.Module], counterparts: Counterparts) -> None:
    """Raise `ValueError` unless every layer has a block and a mixer of exactly the stock classes, unpatched."""
    own_model, first = counterparts.models[type(model)], next(iter(counterparts.models.items()))
    backbone: Any = next((part for part in model.modules() if type(part) in first), model.base_model)
    kinds = getattr(backbone.config, "layer_types", None)
    for index, block in enumerate(backbone.layers):
        expected = [(block, counterparts.block)] if counterparts.block else []
        if counterparts.block or kinds is None or kinds[index] == "linear_attention":
            expected.append((getattr(block, counterparts.place, None), counterparts.layer))
        for part, classes in expected:
            if type(part) not in classes:
                raise ValueError(
                    f"Layer {index} has a module of class {type(part).__name__}, where {own_model.__name__} has "
                    "none. Undo what wraps or replaces parts of the layer before the cut."
                )
    for name, part in parts.items():
        if type(part) not in counterparts.layer or not counterparts.parameters:  # no name and no `forward` is added
            continue
        if "forward" in vars(part):
            raise ValueError(
                f"{name} has a `forward` of its own, as accelerate's offload hooks set it, which would still run "
                "the stock layer. Load the model without `device_map`, or call "
                "`accelerate.hooks.remove_hook_from_submodules(model)` first."
            )
        taken = [attribute for attribute in counterparts.parameters if hasattr(part, attribute)]
        if taken:
            raise ValueError(f"{name or type(part).__name__} already has {taken[0]}, a name that its new class needs.")


def _check_configs(model: nn.Module, configs: list[PreTrainedConfig], counterparts: Counterparts) -> None:
    """Raise `ValueError` unless every configuration in the model is of its family, or of a part without layers."""
    wanted = counterparts.models[type(model)].config_class
    known = {*counterparts.configs, *counterparts.configs.values()}  # own where the caller has moved it already
    known |= {
        type(getattr(config, name)) for config in configs if type(config) in known for name in config.sub_configs
    }
    for config in configs:
        if type(config) not in known:
            needed = next(stock for stock, own in counterparts.configs.items() if own is wanted)
            raise ValueError(
                f"The model's configuration is a {type(config).__name__}; a {type(model).__name__} that is to be "
                f"adopted needs exactly {needed.__name__}."
            )
