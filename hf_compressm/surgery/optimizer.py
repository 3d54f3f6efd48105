"""Carrying the optimizer's state over a cut; `moments` has the table of what follows and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_compressm.families.family import MomentTerm
from hf_compressm.surgery.moments import Role, check_optimizer, fresh_state, misshapen_entry, roles_of, unknown_entry
from hf_compressm.surgery.parameters import Addition, NonFiniteError, Replacement, parameter_order


logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class OptimizerPlan:
    """New parameter lists and states of an optimizer, prepared but not yet in place."""

    optimizer: torch.optim.Optimizer
    groups: list[list[nn.Parameter]]
    states: dict[nn.Parameter, dict[str, Any]]
    removed: list[nn.Parameter]


def prepare_optimizer(
    optimizer: Any,
    model: nn.Module,
    replacements: Sequence[Replacement],
    policy: str = "carry",
    additions: Sequence[Addition] = (),
    removals: Sequence[nn.Parameter] = (),
) -> OptimizerPlan:
    """Work out what the optimizer looks like after the cut, without touching it.

    Args:
        optimizer: a torch optimizer, or accelerate's wrapper around one.
        model: the model, still with its old parameters.
        replacements: the parameters about to be replaced.
        policy: `"carry"` or `"reset"`.
        additions: the parameters about to be added; each joins the group of the parameter it belongs beside, at the
            place where an optimizer made after the cut has it, and has no moments yet.
        removals: the parameters about to be removed.

    Raises:
        ValueError: if the optimizer is not this model's, holds a parameter that the model does not have, or a moment
            is not finite.
    """
    inner = unwrap(optimizer)
    new_of = {id(item.change.parameter): item.new for item in replacements}
    check_optimizer(inner, list(model.parameters()))
    groups = [_with_additions(group["params"], model, additions) for group in inner.param_groups]
    gone = {id(parameter) for parameter in removals}
    groups = [[new_of.get(id(p), p) for p in group if id(p) not in gone] for group in groups]
    states: dict[nn.Parameter, dict[str, Any]] = {}
    begin = {id(item.new) for item in replacements} | {id(item.new) for item in additions}
    for options, group in zip(inner.param_groups, groups, strict=True):
        states |= {p: state for p in group if id(p) in begin and (state := fresh_state(inner, options, p))}
    unknown: dict[str, str] = {}
    roles = roles_of(inner)
    for item in replacements:
        old_state = inner.state.get(item.change.parameter)
        if not old_state or policy == "reset":
            continue
        problem = _unknown_entry(item, inner, roles)
        if problem:
            unknown[item.change.name] = problem
        else:
            states[item.new] = {key: _carry(key, value, item, inner, roles) for key, value in old_state.items()}
            _check_finite(states[item.new], item, inner)
    if unknown:
        name, key = next(iter(unknown.items()))
        logger.warning(
            f"{type(inner).__name__} keeps state that cannot be carried over a cut ({key!r} of {name}); "
            f"it is reset for {len(unknown)} parameter(s)."
        )
    return OptimizerPlan(inner, groups, states, [*(item.change.parameter for item in replacements), *removals])


def commit_optimizer(plan: OptimizerPlan) -> None:
    """Swap parameters and states; order, groups and their options stay."""
    for group, parameters in zip(plan.optimizer.param_groups, plan.groups, strict=True):
        group["params"] = parameters
    for parameter in plan.removed:
        plan.optimizer.state.pop(parameter, None)
    for new, state in plan.states.items():
        plan.optimizer.state[new] = state


def misfit(optimizer: torch.optim.Optimizer) -> str:
    """A description of the first moment that does not have its parameter's shape, or "".

    `Optimizer.load_state_dict` compares the number of parameters but never shapes. State that no rule covers is not
    checked.
    """
    roles = roles_of(optimizer)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if found := misshapen_entry(optimizer.state.get(parameter, {}), parameter, roles):
            key, value = found
            return f"{key!r} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
    return ""


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Drop all state, as if no step had been made."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := fresh_state(optimizer, group, parameter):
                optimizer.state[parameter] = state


def _with_additions(
    group: Sequence[nn.Parameter], model: nn.Module, additions: Sequence[Addition]
) -> list[nn.Parameter]:
    """A group's parameters with the additions that belong to it, each before the first one that follows it."""
    members = list(group)
    held = {id(parameter) for parameter in group}
    order = parameter_order(model, additions) if additions else {}
    for addition in additions:
        if id(addition.wanted.beside) not in held:
            continue
        place = order[id(addition.new)]
        later = (index for index, parameter in enumerate(members) if order[id(parameter)] > place)
        members.insert(next(later, len(members)), addition.new)
    return members


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return optimizer


def _unknown_entry(item: Replacement, optimizer: torch.optim.Optimizer, roles: Mapping[str, Role]) -> str | None:
    """Name of the first entry of any source's state that no rule covers, or None."""
    sources = {term.source for term in item.change.moments} | {item.change.parameter}
    for source in sources:
        state = optimizer.state.get(source, {})
        if state.keys() != optimizer.state[item.change.parameter].keys():
            return "state of " + item.change.name.rsplit(".", 1)[-1]
        unknown = unknown_entry(state, source, roles)
        if unknown:
            return unknown
    return None


def _check_finite(state: dict[str, Any], item: Replacement, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a moment with NaN or infinity, which a change of basis would have spread over all states."""
    for key, value in state.items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"{key!r} of {item.change.name} in {type(optimizer).__name__} is not finite. Go back to an earlier "
                "checkpoint, or pass optimizer_state='reset'."
            )


def _carry(
    key: str, value: Any, item: Replacement, optimizer: torch.optim.Optimizer, roles: Mapping[str, Role]
) -> Any:
    """One entry of the new state."""
    role = roles.get(key)
    if not isinstance(value, Tensor) or role is None:
        return value.clone() if isinstance(value, Tensor) else value
    if role in ("first", "second"):
        return _mapped(key, item.change.moments, optimizer, squared=role == "second")
    return _mapped_factor(key, role, value, item, optimizer)


def _mapped(key: str, terms: Sequence[MomentTerm], optimizer: torch.optim.Optimizer, squared: bool) -> Tensor:
    """Sum of the mapped moments of all sources, in the moment's dtype and on its device."""
    moments = [optimizer.state[term.source][key] for term in terms]
    mapped = [_apply(term, moment, term.dim, squared) for term, moment in zip(terms, moments, strict=True)]
    return torch.stack(mapped).sum(dim=0).to(device=moments[0].device, dtype=moments[0].dtype).contiguous()


def _mapped_factor(key: str, role: Role, value: Tensor, item: Replacement, optimizer: torch.optim.Optimizer) -> Tensor:
    """A factor after the cut: one without the cut axis is an average over it and stays, the other one is mapped."""
    dims = list(range(item.change.parameter.dim()))
    dims.pop(-1 if role == "row" else -2)
    first = item.change.moments[0]
    if first.matrix.dim() > 0 and first.dim not in dims:
        return value.clone()
    places = [dims.index(term.dim) if term.dim in dims else 0 for term in item.change.moments]  # 0: a plain number
    terms = [replace(term, dim=place) for term, place in zip(item.change.moments, places, strict=True)]
    return _mapped(key, terms, optimizer, squared=True)


def _apply(term: MomentTerm, moment: Tensor, dim: int, squared: bool) -> Tensor:
    """Apply the term's map along one axis, in float64 unless it only selects."""
    matrix = term.matrix.to(moment.device)
    if not matrix.is_floating_point():
        return moment.index_select(dim, matrix)
    moment = moment.double()
    matrix = matrix.square() if squared else matrix
    if matrix.dim() == 0:
        return matrix * moment
    if matrix.dim() == 2:
        return torch.tensordot(matrix, moment, dims=([1], [dim])).movedim(0, dim)
    grouped = moment.movedim(dim, 1)  # (groups, old, ...)
    mapped = matrix @ grouped.flatten(2) if grouped.dim() > 2 else (matrix @ grouped[..., None])[..., 0]
    return mapped.reshape(*mapped.shape[:2], *grouped.shape[2:]).movedim(1, dim)
