"""Replacing and adding parameters of a live model, all or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_compressm.families.changes import AttributeChange, ParameterAddition, ParameterChange
from hf_compressm.utils.devices import first_not_finite, to_device


_HOOK_FIELDS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class NonFiniteError(ValueError):
    """A new parameter or moment would hold NaN or infinity."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """One parameter about to be replaced.

    Attributes:
        change: the change that the family wants.
        new: the parameter that takes its place, in the old one's dtype and on its device.
        owners: every module and attribute name that holds the old parameter; several where weights are tied.
    """

    change: ParameterChange
    new: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True, eq=False)
class Addition:
    """One parameter about to be added.

    Attributes:
        wanted: the addition that the family wants.
        new: the parameter, in the dtype and on the device of the one it belongs beside.
    """

    wanted: ParameterAddition
    new: nn.Parameter

    @property
    def attribute(self) -> str:
        """The name of the parameter in its module."""
        return self.wanted.name.rpartition(".")[2]


def prepare_replacements(model: nn.Module, changes: Sequence[ParameterChange]) -> list[Replacement]:
    """Build the new parameters without touching the model.

    A new parameter keeps the dtype, device, `requires_grad`, hooks and marks (`_no_weight_decay`, ...) of the old one.

    Raises:
        ValueError: if a parameter is no longer part of the model, two layers share it, or its new value is not finite.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    replacements: list[Replacement] = []
    taken: dict[int, str] = {}
    for change in changes:
        first = taken.setdefault(id(change.parameter), change.name)
        if first != change.name:
            raise ValueError(
                f"{first} and {change.name} are one shared parameter, but each layer is cut in its own way. "
                "Untie them, or leave these layers out with ignore_layers."
            )
        if id(change.parameter) not in owners:
            raise ValueError(f"{change.name} is no longer the parameter that was planned for. Make a new plan.")
        replacements.append(Replacement(change, _new_parameter(change), tuple(owners[id(change.parameter)])))
    _check_finite([(item.change.name, item.new) for item in replacements])
    return replacements


def prepare_additions(additions: Sequence[ParameterAddition]) -> list[Addition]:
    """Build the parameters to add, without touching the model.

    Raises:
        ValueError: if a new value is not finite.
    """
    prepared = []
    for wanted in additions:
        beside = wanted.beside
        value = to_device(wanted.value.to(beside.dtype), beside.device).contiguous()
        prepared.append(Addition(wanted, nn.Parameter(value, requires_grad=beside.requires_grad)))
    _check_finite([(item.wanted.name, item.new) for item in prepared])
    return prepared


def parameter_order(model: nn.Module, additions: Sequence[Addition]) -> dict[int, int]:
    """The place of every parameter, by its id, in the model as it will be with the additions."""
    order: dict[int, int] = {}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        own += [addition.new for addition in additions if addition.wanted.module is module]
        for parameter in own:
            order.setdefault(id(parameter), len(order))
    return order


def commit_replacements(
    replacements: Sequence[Replacement],
    attributes: Sequence[AttributeChange],
    additions: Sequence[Addition] = (),
) -> None:
    """Put the new parameters and attributes in place; nothing here can fail half-way."""
    for replacement in replacements:
        for module, name in replacement.owners:
            module._parameters[name] = replacement.new
    for addition in additions:
        addition.wanted.module._parameters[addition.attribute] = addition.new
    for attribute in attributes:
        setattr(attribute.module, attribute.name, attribute.value)


def _check_finite(new: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Refuse NaN and infinity in new parameters, each with its name."""
    place = first_not_finite([value for _, value in new])
    if place is not None:
        name, value = new[place]
        raise NonFiniteError(
            f"The new {name} is not finite in {value.dtype}. Cut less, or keep this layer in float32."
        )


def _new_parameter(change: ParameterChange) -> nn.Parameter:
    old = change.parameter
    value = to_device(change.value.to(old.dtype), old.device)
    value = value.clone(memory_format=torch.contiguous_format)  # strides too: DDP compares them with its buckets
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    if getattr(old, "grad_dtype", old.dtype) != old.dtype:  # gradients in another dtype, or (None) in any
        new.grad_dtype = old.grad_dtype  # type: ignore[attr-defined, unused-ignore]
    for field in _HOOK_FIELDS:
        if getattr(old, field, None):
            setattr(new, field, getattr(old, field))
    return new
