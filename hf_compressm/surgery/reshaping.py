"""Giving a live model the sizes of another one, larger or smaller, before weights of these sizes are loaded into it.

A skeleton of the other model, built from its configuration without memory for parameters, shows what every SSM layer
has to look like. So nothing here depends on the family, and a projection that a cut has added is one more parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compressm.families import SSMLayer, find_layers
from hf_compressm.families.family import AttributeChange, ParameterAddition, ParameterChange
from hf_compressm.models import adopt, own_class, release
from hf_compressm.peft import plain_modules, underlying
from hf_compressm.surgery.lora import resized
from hf_compressm.surgery.optimizer import commit_optimizer, prepare_optimizer
from hf_compressm.surgery.parameters import commit_replacements, prepare_additions, prepare_replacements
from hf_compressm.surgery.snapshot import Snapshot


OF_THE_PROCESS = (
    "_name_or_path",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "_output_attentions",
)
"""Values of a configuration that belong to this process and not to the model: they stay when sizes are taken over."""


@dataclass(frozen=True, eq=False)
class Differences:
    """What has to change in a model's SSM layers for it to look like a skeleton."""

    changes: list[ParameterChange]
    additions: list[ParameterAddition]
    removals: list[tuple[nn.Module, str, bool]]  # owner, name, whether the name stays, with None
    attributes: list[AttributeChange]


def skeleton(model_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    """A model built from a configuration; its parameters take no memory, its buffers and attributes are real.

    Raises:
        ValueError: if the class cannot be built from a configuration alone.
    """
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        try:
            return model_class(config)
        except TypeError as error:
            raise ValueError(
                f"{model_class.__name__} cannot be built from its configuration alone ({error}), so it cannot take "
                "the sizes of a checkpoint. Load the model from the checkpoint before training."
            ) from error


def reshape_model(model: Any, wanted: PreTrainedModel, optimizer: Any = None) -> bool:
    """Give a live model the class, configuration and state sizes of a skeleton; all at once, or not at all.

    Resized parameters hold zeros until weights are loaded into them, and have no optimizer state. Parameters that have
    their shape already stay the same tensors.

    Args:
        model: the model, perhaps inside a `PeftModel`.
        wanted: a skeleton, of the model's class or of its stock or own counterpart.
        optimizer: the optimizer that trains the model, if any; it gets the new parameters.

    Returns:
        Whether anything had another shape.

    Raises:
        ValueError: if the skeleton is of another kind of model, or has other layers.
    """
    before = Snapshot(model, optimizer)
    try:
        _take_class(underlying(model), type(wanted))
        found = _differences(underlying(model), wanted)
        replacements = prepare_replacements(model, found.changes)
        additions = prepare_additions(found.additions)
        if optimizer is not None:
            removed = [p for module, name, _ in found.removals if (p := module._parameters[name]) is not None]
            commit_optimizer(prepare_optimizer(optimizer, model, replacements, "reset", additions, removed))
        commit_replacements(replacements, found.attributes, additions)
        for module, name, stays in found.removals:
            module._parameters[name] = None
            if not stays:
                del module._parameters[name]
        _take_values(model.config, wanted.config)
    except BaseException:
        before.restore()
        raise
    return bool(found.changes or found.additions or found.removals)


def _take_class(model: PreTrainedModel, wanted: type) -> None:
    """Move between the stock and this package's class, if the other one is wanted."""
    if type(model) is wanted:
        return
    if wanted is own_class(type(model)):
        adopt(model)
    elif own_class(wanted) is type(model):
        release(model)
    else:
        raise ValueError(
            f"The checkpoint is of a {wanted.__name__}, the model is a {type(model).__name__}. Resume with the kind "
            "of model that the checkpoint was saved from."
        )


def _take_values(present: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Take over a configuration's values, except those that belong to the process."""
    kept = {name: value for name, value in vars(present).items() if name in OF_THE_PROCESS}
    vars(present).clear()
    vars(present).update({**vars(config), **kept})


def _differences(model: PreTrainedModel, wanted: PreTrainedModel) -> Differences:
    layers, goals = find_layers(model), find_layers(wanted)
    if [layer.name for layer in layers] != [layer.name for layer in goals]:
        raise ValueError(
            f"The checkpoint's configuration has {len(goals)} SSM layers ({goals[0].name}, ...), the model "
            f"{len(layers)} ({layers[0].name}, ...). Resume with the kind of model that the checkpoint was saved from."
        )
    _check_the_rest(model, wanted, [layer.name for layer in layers])
    found = Differences([], [], [], [])
    for layer, goal in zip(layers, goals, strict=True):
        for name, part in plain_modules(layer.module):
            prefix = ".".join(piece for piece in (layer.name, name) if piece)
            counterpart = goal.module.get_submodule(name)
            _compare_parameters(layer, prefix, part, counterpart, found)
            found.attributes.extend(_other_attributes(part, counterpart))
        for change in resized(layer, goal.module):
            if isinstance(change, ParameterChange):
                found.changes.append(change)
            else:
                found.attributes.append(change)
    return found


def _check_the_rest(model: PreTrainedModel, wanted: PreTrainedModel, layers: list[str]) -> None:
    """Raise `ValueError` unless what lies outside the SSM layers has the shapes of the skeleton."""
    prefixes = tuple(f"{name}." if name else "" for name in layers)
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.named_parameters()}
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes) and shapes.get(name, parameter.shape) != parameter.shape:
            raise ValueError(
                f"The checkpoint's configuration gives {name} the shape {shapes[name]}, the model has "
                f"{tuple(parameter.shape)}. Resume with the kind of model that the checkpoint was saved from."
            )


def _compare_parameters(layer: SSMLayer, prefix: str, part: nn.Module, goal: nn.Module, found: Differences) -> None:
    """Collect the parameters of one module that have another shape, are missing, or have to go."""
    for name in dict.fromkeys([*part._parameters, *goal._parameters]):
        present, wanted = part._parameters.get(name), goal._parameters.get(name)
        if wanted is None and present is not None:
            found.removals.append((part, name, name in goal._parameters))
        elif wanted is not None and present is None:
            beside = max(layer.module.parameters(), key=Tensor.numel)
            found.additions.append(ParameterAddition(f"{prefix}.{name}", part, torch.zeros(wanted.shape), beside))
        elif wanted is not None and present is not None and wanted.shape != present.shape:
            value = torch.zeros(wanted.shape, dtype=present.dtype)
            found.changes.append(ParameterChange(f"{prefix}.{name}", present, value, ()))


def _other_attributes(part: nn.Module, goal: nn.Module) -> Iterator[AttributeChange]:
    """Changes of plain whole numbers that differ, and of buffers with another shape."""
    for name, value in vars(goal).items():
        if type(value) is int and vars(part).get(name) != value:
            yield AttributeChange(part, name, value)
    for name, buffer in goal.named_buffers(recurse=False):
        present = getattr(part, name, None)
        if isinstance(present, Tensor) and present.shape != buffer.shape:
            yield AttributeChange(part, name, buffer.to(present))
