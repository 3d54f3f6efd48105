"""Replacing parameters of a live model, all or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_compressm.adapters.base import AttributeChange, ParameterChange


_HOOK_FIELDS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class NonFiniteError(ValueError):
    """A new parameter or moment would hold NaN or infinity."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """One parameter about to be replaced.

    Attributes:
        change: what the adapter asked for.
        new: the parameter that takes its place, in the old one's dtype and on its device.
        owners: every module and attribute name that holds the old parameter; several where weights are tied.
    """

    change: ParameterChange
    new: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]


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
        new = _new_parameter(change)
        if not bool(torch.isfinite(new).all()):
            raise NonFiniteError(
                f"The new {change.name} is not finite in {new.dtype}. Cut less, or hold this layer in float32."
            )
        replacements.append(Replacement(change, new, tuple(owners[id(change.parameter)])))
    return replacements


def commit_replacements(replacements: Sequence[Replacement], attributes: Sequence[AttributeChange]) -> None:
    """Put the new parameters and attributes in place; nothing here can fail half-way."""
    for replacement in replacements:
        for module, name in replacement.owners:
            module._parameters[name] = replacement.new
    for attribute in attributes:
        setattr(attribute.module, attribute.name, attribute.value)


def _new_parameter(change: ParameterChange) -> nn.Parameter:
    old = change.parameter
    value = change.value.to(device=old.device, dtype=old.dtype).contiguous()
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    for field in _HOOK_FIELDS:
        if getattr(old, field, None):
            setattr(new, field, getattr(old, field))
    return new
