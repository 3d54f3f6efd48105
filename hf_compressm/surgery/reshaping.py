"""Giving a live model the sizes of another one, larger or smaller, before weights of these sizes are loaded into it.

A skeleton of the other model, built from its configuration without memory for parameters, shows what every SSM layer
has to look like. So nothing here depends on the family, and a projection that a cut has added is one more parameter.
Where no configuration says how large the layers are, as in a module of one's own, the shapes of the weights do, and
each family knows what else follows them.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_compressm.families import SSMLayer, find_layers
from hf_compressm.families.changes import AttributeChange, ParameterAddition, ParameterChange
from hf_compressm.models import adopt, own_class, release
from hf_compressm.peft import plain_modules, underlying
from hf_compressm.surgery.configuration import Record, detach_configs, replace_configs, rewritten
from hf_compressm.surgery.lora import resized
from hf_compressm.surgery.optimizer import commit_optimizer, prepare_optimizer
from hf_compressm.surgery.parameters import commit_replacements, prepare_additions, prepare_replacements
from hf_compressm.surgery.snapshot import Snapshot
from hf_compressm.utils.configurations import configuration_of


logger = logging.get_logger(__name__)

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


def follows_config(model: PreTrainedModel) -> bool:
    """Whether the class of a model builds SSM layers as large as its configuration says; it is tried with other sizes.

    Args:
        model: a model whose own configuration has the size of each of its layers.
    """
    layers = find_layers(model)
    doubled = {layer.name: 2 * layer.state_size for layer in layers}
    values = {layer.name: layer.family.configured(layer.module, doubled[layer.name]) for layer in layers}
    config = rewritten(model, layers, values, lambda *_: None).of(model, model.config)
    try:
        return {layer.name: layer.state_size for layer in find_layers(skeleton(type(model), config))} == doubled
    except Exception as error:  # a model class may raise anything
        logger.info(f"{type(model).__name__} cannot be built from its configuration alone: {error}")
        return False


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
        detach_configs(model)
        _take_class(underlying(model), type(wanted))
        found = _differences(underlying(model), wanted)
        _apply(model, found, optimizer)
        _take_values(model, wanted)
    except BaseException:
        before.restore()
        raise
    return bool(found.changes or found.additions or found.removals)


def reshape_layers(
    model: nn.Module, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], record: Record, optimizer: Any = None
) -> bool:
    """Give the SSM layers of a live model the sizes of saved ones; all at once, or not at all.

    As `reshape_model`, for a model whose own configuration does not say how large its layers are. Configurations of
    parts of it that do are rewritten.

    Args:
        model: any module.
        shapes: by name of a layer, the shapes of its saved parameters by their names in it.
        record: as for `rewritten`.
        optimizer: the optimizer that trains the model, if any; it gets the new parameters.

    Returns:
        Whether anything had another shape.

    Raises:
        ValueError: if the shapes are those of no state size, or the family cannot tell what follows them.
    """
    layers = find_layers(model)
    before = Snapshot(model, optimizer)
    try:
        found = Differences([], [], [], [])
        sizes = {layer.name: _resize(layer, shapes[layer.name], found) for layer in layers}
        _apply(model, found, optimizer)
        values = {layer.name: layer.family.configured(layer.module, sizes[layer.name]) for layer in layers}
        rewritten(model, layers, values, record).commit()
    except BaseException:
        before.restore()
        raise
    return bool(found.changes)


def _resize(layer: SSMLayer, saved: Mapping[str, tuple[int, ...]], found: Differences) -> int:
    """Collect what has to change in a layer for its parameters to have saved shapes; returns the state size."""
    parts = list(plain_modules(layer.module))
    present = {
        f"{place}.{name}" if place else name: parameter
        for place, part in parts
        for name, parameter in part.named_parameters(recurse=False)
    }
    absent = next((name for name in present if name not in saved), None)
    if absent is not None:
        raise ValueError(f"There is no tensor for {absent} of {layer.name}. Resume with the model that was saved.")
    different = [name for name, parameter in present.items() if tuple(parameter.shape) != saved[name]]
    if not different:
        return layer.state_size
    step = layer.family.granularity(layer.module)
    largest = 2 * max((size for name in different for size in saved[name]), default=0)  # S5 counts pairs
    for size in range(step, largest + 1, step):
        wanted = layer.family.at_size(layer.module, size)
        if wanted is None:
            raise ValueError(
                f"{layer.name} has another size than the saved one, and the family {layer.family.name!r} does not "
                "define at_size, by which a model without a configuration takes sizes over. Build the model with the "
                "saved sizes before training."
            )
        if all(wanted.shapes.get(name, tuple(p.shape)) == saved[name] for name, p in present.items()):
            for name in different:
                value = torch.zeros(saved[name], dtype=present[name].dtype)
                full = f"{layer.name}.{name}" if layer.name else name
                found.changes.append(ParameterChange(full, present[name], value, ()))
            found.attributes.extend(wanted.attributes)
            weights = {f"{place}.weight" if place else "weight": place for place, _ in parts}
            _resize_adapters(
                layer, {place: saved[name][0] for name, place in weights.items() if name in different}, found
            )
            return size
    name = different[0]
    raise ValueError(
        f"{name} of {layer.name} has the shape {tuple(present[name].shape)} here and {saved[name]} in the file; "
        f"no number of states gives it to a {layer.family.name} layer of this width. Resume with the model that was "
        "saved."
    )


def _apply(model: nn.Module, found: Differences, optimizer: Any) -> None:
    """Put parameters of other shapes in place, in the optimizer too; they hold zeros."""
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


def _take_values(model: Any, wanted: PreTrainedModel) -> None:
    """Take over the configurations of a skeleton and its parts, except for values that belong to the process."""
    counterparts = dict(wanted.named_modules())
    memo: dict[int, Any] = {}
    new: dict[int, Any] = {}
    for name, part in plain_modules(underlying(model)):
        present, config = (configuration_of(each) for each in (part, counterparts.get(name)))
        if isinstance(present, PreTrainedConfig) and isinstance(config, PreTrainedConfig) and id(present) not in new:
            new[id(present)] = copy.deepcopy(config, memo)
            _keep_of_the_process(present, new[id(present)])
    replace_configs(model, new)


def _keep_of_the_process(present: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Copy the values of a configuration, and of those inside it, that belong to the process."""
    vars(config).update({name: value for name, value in vars(present).items() if name in OF_THE_PROCESS})
    if "use_cache" in vars(present):  # a Trainer sets it, and composite configurations do not save it
        vars(config).setdefault("use_cache", vars(present)["use_cache"])
    for name, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig) and isinstance(vars(present).get(name), PreTrainedConfig):
            _keep_of_the_process(vars(present)[name], inner)


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
        parts = goal.module.named_modules()
        _resize_adapters(
            layer, {name: part.out_features for name, part in parts if hasattr(part, "out_features")}, found
        )
    return found


def _resize_adapters(layer: SSMLayer, widths: Mapping[str, int], found: Differences) -> None:
    """Collect what has to change in LoRA adapters around projections that get other widths."""
    for change in resized(layer, widths):
        if isinstance(change, ParameterChange):
            found.changes.append(change)
        else:
            found.attributes.append(change)


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
