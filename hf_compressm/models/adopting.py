"""Moving a live stock Mamba or Mamba-2 into this package's class, in place and without touching a tensor.

Stock and own classes hold the same modules, parameters and buffers, so only the class of the objects has to change.
Parameters keep their identity: optimizer, hooks and all references stay valid.
"""

from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model, MambaConfig, MambaForCausalLM, MambaModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block, Mamba2Mixer

from .configuration_compressm_mamba import CompreSSMambaConfig
from .configuration_compressm_mamba2 import CompreSSMamba2Config
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


_MODELS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    MambaModel: CompreSSMambaModel,
    MambaForCausalLM: CompreSSMambaForCausalLM,
    Mamba2Model: CompreSSMamba2Model,
    Mamba2ForCausalLM: CompreSSMamba2ForCausalLM,
}
_PARTS: dict[type, type] = {
    MambaBlock: CompreSSMambaBlock,
    MambaMixer: CompreSSMambaMixer,
    Mamba2Block: CompreSSMamba2Block,
    Mamba2Mixer: CompreSSMamba2Mixer,
}
_CONFIGS: dict[type, type] = {MambaConfig: CompreSSMambaConfig, Mamba2Config: CompreSSMamba2Config}
_CLASSES: dict[type, type] = {**_MODELS, **_PARTS}
# Parameters of an own mixer, which a stock mixer gets when it is adopted.
_PROJECTIONS = ("B_proj", "C_proj")


def own_class(stock_class: type) -> type | None:
    """This package's class for a stock model, block or mixer class; an own class itself; None for others."""
    return stock_class if stock_class in _CLASSES.values() else _CLASSES.get(stock_class)


def stock_class(model_class: type) -> type:
    """The stock class of an own model class; any other class itself."""
    return next((stock for stock, own in _MODELS.items() if own is model_class), model_class)


def own_config_class(stock_class: type) -> type | None:
    """This package's class for a stock configuration class; an own class itself; None for others."""
    return stock_class if stock_class in _CONFIGS.values() else _CONFIGS.get(stock_class)


def adopt(model: nn.Module) -> None:
    """Turn a stock Mamba or Mamba-2, live and perhaps in training, into this package's class, in place.

    The model, its backbone, blocks and mixers change their class, and so does the one configuration
    that they share. No tensor moves; hooks, buffers, mode and generation configuration stay. The sizes stay
    those of the stock model, until the caller changes them layer by layer. A model of an own class is left as it is.
    Everything is checked before anything changes.

    Args:
        model: A `MambaModel`, `MambaForCausalLM`, `Mamba2Model` or `Mamba2ForCausalLM`, not a subclass.

    Raises:
        ValueError: When the model is none of these, or a part of it is not as its class builds it.
    """
    if type(model) in _MODELS.values():
        return
    if type(model) not in _MODELS:
        known = ", ".join(stock.__name__ for stock in _MODELS)
        raise ValueError(
            f"The model is a {type(model).__name__}, which has no counterpart here: only {known} can be adopted, "
            "and no subclasses. Pass the model without its wrapper, or keep the stock class with `compat='stock'`."
        )
    parts = {name: part for name, part in model.named_modules() if type(part) in _CLASSES}
    found = [getattr(part, "config", None) for part in model.modules()]
    configs = list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
    _check_parts(model, parts)
    _check_configs(model, configs)
    for config in configs:
        adopt_config(config)
    for part in parts.values():
        part.__class__ = _CLASSES[type(part)]
        if isinstance(part, PreTrainedModel):  # which holds its own copy of the class's set
            part._no_split_modules = set(type(part)._no_split_modules)
        if isinstance(part, CompreSSMamba2Mixer):
            for name in _PROJECTIONS:
                part.register_parameter(name, None)


def release(model: nn.Module) -> None:
    """Turn a model of an own class back into the stock one, in place: the inverse of `adopt`.

    This is needed to go back to a checkpoint from before the first cut into the own class. No tensor moves: the caller
    changes sizes that a stock model cannot have, and removes projections. A stock model is left as it is.
    """
    stock_of = {own: stock for stock, own in _CLASSES.items()}
    if type(model) not in _MODELS.values():
        return
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        release_config(config)
    for part in model.modules():
        if isinstance(part, CompreSSMamba2Mixer):
            for name in _PROJECTIONS:
                if part._parameters[name] is None:
                    del part._parameters[name]
        if type(part) in stock_of:
            part.__class__ = stock_of[type(part)]
            if isinstance(part, PreTrainedModel):
                part._no_split_modules = set(type(part)._no_split_modules)


def release_config(config: PreTrainedConfig) -> None:
    """Turn the configuration of an own class back into the stock one, in place; leave others alone."""
    for stock, own in _CONFIGS.items():
        if type(config) is own:
            config.__class__ = stock
            vars(config).pop("conv_state_size", None)


def adopt_config(config: PreTrainedConfig) -> None:
    """Turn the configuration of a stock Mamba or Mamba-2 into this package's class, in place; leave others alone."""
    if type(config) not in _CONFIGS:
        return
    config.__class__ = _CONFIGS[type(config)]
    vars(config).pop("model_type", None)  # which a loaded configuration repeats on the instance
    if isinstance(config, CompreSSMamba2Config):
        config.conv_state_size = None


def _check_parts(model: nn.Module, parts: dict[str, nn.Module]) -> None:
    """Raise `ValueError` unless every layer has a block and a mixer of exactly the stock classes, unpatched."""
    own_model = _MODELS[type(model)]
    backbone = getattr(model, "backbone", model)
    for index, block in enumerate(backbone.layers):
        for part in (block, getattr(block, "mixer", None)):
            if type(part) not in _PARTS:
                raise ValueError(
                    f"Layer {index} has a module of class {type(part).__name__}, where {own_model.__name__} has "
                    "none. Undo what wraps or replaces parts of the layer before the cut."
                )
    for name, part in parts.items():
        if isinstance(part, MambaBlock | MambaMixer):  # whose own classes add no name and no `forward`
            continue
        if isinstance(part, Mamba2Mixer) and "forward" in vars(part):
            raise ValueError(
                f"{name} has a `forward` of its own, as accelerate's offload hooks set it, which would still run "
                "the stock layer. Load the model without `device_map`, or call "
                "`accelerate.hooks.remove_hook_from_submodules(model)` first."
            )
        taken = [attribute for attribute in _PROJECTIONS if hasattr(part, attribute)]
        if taken:
            raise ValueError(f"{name or type(part).__name__} already has {taken[0]}, a name that its new class needs.")


def _check_configs(model: nn.Module, configs: list[PreTrainedConfig]) -> None:
    """Raise `ValueError` unless every configuration in the model is of its family."""
    own_config = _MODELS[type(model)].config_class
    expected = {stock for stock, own in _CONFIGS.items() if own is own_config}
    for config in configs:
        if type(config) not in {own_config, *expected}:  # the own one where the caller has moved it already
            raise ValueError(
                f"The model's configuration is a {type(config).__name__}; a {type(model).__name__} that is to be "
                f"adopted needs exactly {', '.join(stock.__name__ for stock in expected)}."
            )
