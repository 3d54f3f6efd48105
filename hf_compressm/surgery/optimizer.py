"""Carrying the optimizer's state over a cut; `moments` has the table of what follows and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_compressm.families.complex_terms import ComplexTerm
from hf_compressm.surgery.mapping import mapped
from hf_compressm.surgery.moments import FACTORS, Role, fresh_state, misshapen_entry, roles_of, unknown_entry
from hf_compressm.surgery.parameters import Addition, NonFiniteError, Replacement, parameter_order
from hf_compressm.surgery.stores import Store, check_optimizer, optimizers_in, parameters_of, state_of, stores_in
from hf_compressm.utils.devices import first_not_finite


logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class StorePlan:
    """New parameter lists and states of one torch optimizer, prepared but not yet in place."""

    store: Store
    groups: list[list[nn.Parameter]]
    states: dict[nn.Parameter, dict[str, Any]]
    removed: list[nn.Parameter]


@dataclass(frozen=True, eq=False)
class OptimizerPlan:
    """What becomes of an optimizer and of those inside of it.

    Attributes:
        parts: one for each place where groups or state are stored.
        shown: every optimizer, each with the parameters that it has to show afterwards, and the keys of their state.
    """

    parts: list[StorePlan]
    shown: list[tuple[torch.optim.Optimizer, dict[int, set[str]]]]

    def new_tensors(self) -> list[Tensor]:
        """The new moments, in an order that is the same in all processes."""
        states = [state for part in self.parts for state in part.states.values()]
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


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
        optimizer: a torch optimizer, a wrapper around one or several, or a list of them.
        model: the model, still with its old parameters.
        replacements: the parameters about to be replaced.
        policy: `"carry"` or `"reset"`.
        additions: the parameters about to be added; each joins the group of the parameter it belongs beside, at the
            place where an optimizer made after the cut has it, and has no moments yet.
        removals: the parameters about to be removed.

    Raises:
        ValueError: if the optimizer is not this model's, holds a parameter that the model does not have or where no
            cut can replace it, or a moment is not finite.
    """
    check_optimizer(optimizer, list(model.parameters()))
    new_of = {id(item.change.parameter): item.new for item in replacements}
    gone = {id(parameter) for parameter in removals}
    begin = {id(item.new) for item in replacements} | {id(item.new) for item in additions}
    removed = [*(item.change.parameter for item in replacements), *removals]
    parts = []
    for store in stores_in(optimizer):
        groups = [_with_additions(group["params"], model, additions) for group in store.groups]
        groups = [[new_of.get(id(p), p) for p in group if id(p) not in gone] for group in groups]
        states: dict[nn.Parameter, dict[str, Any]] = {}
        for options, group in zip(store.groups, groups, strict=True):
            fresh = {p: fresh_state(store.optimizer, options, p) for p in group if id(p) in begin}
            states |= {p: state for p, state in fresh.items() if state}
        if policy != "reset":
            states |= _carried(store, replacements)
        parts.append(StorePlan(store, groups, states, removed))
    shown = [(each, _to_show(each, parts, new_of, gone, additions)) for each in optimizers_in(optimizer)]
    return OptimizerPlan(parts, shown)


def commit_optimizer(plan: OptimizerPlan) -> None:
    """Swap parameters and states; order, groups and their options stay.

    Raises:
        ValueError: if an optimizer does not show afterwards what it was given.
    """
    for part in plan.parts:
        for group, parameters in zip(part.store.groups, part.groups, strict=True):
            group["params"] = parameters
        for parameter in part.removed:
            part.store.state.pop(parameter, None)
        for new, state in part.states.items():
            part.store.state[new] = state
    for optimizer, wanted in plan.shown:
        _verify(optimizer, wanted, {id(parameter) for part in plan.parts for parameter in part.removed})


def misfit(optimizer: Any) -> str:
    """A description of the first moment that does not have its parameter's shape, or "".

    `Optimizer.load_state_dict` compares the number of parameters but never shapes. State that no rule covers is not
    checked.
    """
    for store in stores_in(optimizer):
        roles = roles_of(store.optimizer)
        for parameter, state in store.state.items():
            if isinstance(parameter, nn.Parameter) and (found := misshapen_entry(state, parameter, roles)):
                key, value = found
                return f"{key!r} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
    return ""


def reset(optimizer: Any) -> None:
    """Drop all state, as if no step had been made."""
    for store in stores_in(optimizer):
        store.state.clear()
        for group in store.groups:
            for parameter in group["params"]:
                if state := fresh_state(store.optimizer, group, parameter):
                    store.state[parameter] = state


def _carried(store: Store, replacements: Sequence[Replacement]) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of the new parameters in one store; without that which no rule covers, of which it warns."""
    states: dict[nn.Parameter, dict[str, Any]] = {}
    unknown: dict[str, str] = {}
    roles = roles_of(store.optimizer)
    for item in replacements:
        old_state = store.state.get(item.change.parameter)
        if not old_state:
            continue
        problem = _unknown_entry(item, store, roles)
        if problem:
            unknown[item.change.name] = problem
        else:
            states[item.new] = {key: _carry(key, value, item, store, roles) for key, value in old_state.items()}
    _check_finite(states, replacements, store.optimizer)
    if unknown:
        name, key = next(iter(unknown.items()))
        logger.warning(
            f"{type(store.optimizer).__name__} keeps state that cannot be carried over a cut ({key!r} of {name}); "
            f"it is reset for {len(unknown)} parameter(s)."
        )
    return states


def _to_show(
    optimizer: torch.optim.Optimizer,
    parts: Sequence[StorePlan],
    new_of: Mapping[int, nn.Parameter],
    gone: set[int],
    additions: Sequence[Addition],
) -> dict[int, set[str]]:
    """The parameters, by id, that an optimizer has to show after the cut, each with the keys of its state."""
    before = {id(parameter) for parameter in parameters_of(optimizer)}
    after = {id(new_of[old]) if old in new_of else old for old in before - gone}
    after |= {id(addition.new) for addition in additions if id(addition.wanted.beside) in before}
    wanted: dict[int, set[str]] = {parameter: set() for parameter in after}
    keys_before = {id(parameter): set(state) for parameter, state in state_of(optimizer).items()}
    keys_after = {id(new): keys_before.get(old, set()) for old, new in new_of.items()}
    for part in parts:
        for new, state in part.states.items():
            if id(new) in wanted:
                wanted[id(new)] |= state.keys() & keys_after.get(id(new), set())
    return wanted


def _verify(optimizer: torch.optim.Optimizer, wanted: Mapping[int, set[str]], removed: set[int]) -> None:
    """Raise `ValueError` unless an optimizer shows the parameters that it was given, and their state."""
    state = {id(parameter): values for parameter, values in state_of(optimizer).items()}
    shown = {id(parameter) for parameter in parameters_of(optimizer)}
    lacking = [parameter for parameter, keys in wanted.items() if keys and not keys <= state.get(parameter, {}).keys()]
    if shown == wanted.keys() and not lacking and not state.keys() & removed:
        return
    what = "the state of new parameters" if shown == wanted.keys() else "the new parameters"
    raise ValueError(
        f"{type(optimizer).__name__} does not show {what} that the cut gave to it: it keeps them where a cut cannot "
        "write. Everything is as it was before the cut. Pass the torch optimizers inside of it as a list to compress, "
        "or train with an optimizer that keeps its param_groups and state as torch.optim.Optimizer does."
    )


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


def _unknown_entry(item: Replacement, store: Store, roles: Mapping[str, Role]) -> str | None:
    """Name of the first entry of any source's state that no rule covers, or None."""
    sources = {term.source for term in item.change.moments} | {item.change.parameter}
    for source in sources:
        state = store.state.get(source, {})
        if state.keys() != store.state[item.change.parameter].keys():
            return "state of " + item.change.name.rsplit(".", 1)[-1]
        unknown = unknown_entry(state, source, roles)
        if unknown:
            return unknown
    if any(isinstance(term, ComplexTerm) for term in item.change.moments):
        return next((key for key in store.state[item.change.parameter] if roles.get(key) in FACTORS), None)
    return None


def _check_finite(
    states: Mapping[nn.Parameter, dict[str, Any]], replacements: Sequence[Replacement], optimizer: Any
) -> None:
    """Refuse a moment with NaN or infinity, which a change of basis would have spread over all states."""
    names = {id(item.new): item.change.name for item in replacements}
    moments = [
        (key, names[id(parameter)], value)
        for parameter, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    ]
    place = first_not_finite([value for *_, value in moments])
    if place is not None:
        key, name, _ = moments[place]
        raise NonFiniteError(
            f"{key!r} of {name} in {type(optimizer).__name__} is not finite. Go back to an earlier "
            "checkpoint, or pass optimizer_state='reset'."
        )


def _carry(key: str, value: Any, item: Replacement, store: Store, roles: Mapping[str, Role]) -> Any:
    """One entry of the new state."""
    role = roles.get(key)
    if not isinstance(value, Tensor) or role is None:
        return value.clone() if isinstance(value, Tensor) else value
    if role in ("first", "second"):
        return mapped(item.change.moments, lambda source: store.state[source][key], squared=role == "second")
    return _mapped_factor(key, role, value, item, store)


def _mapped_factor(key: str, role: Role, value: Tensor, item: Replacement, store: Store) -> Tensor:
    """A factor after the cut: one without the cut axis is an average over it and stays, the other one is mapped."""
    dims = list(range(item.change.parameter.dim()))
    dims.pop(-1 if role == "row" else -2)
    first = item.change.moments[0]
    if first.matrix.dim() > 0 and first.dim not in dims:
        return value.clone()
    places = [dims.index(term.dim) if term.dim in dims else 0 for term in item.change.moments]  # 0: a plain number
    terms = [replace(term, dim=place) for term, place in zip(item.change.moments, places, strict=True)]
    return mapped(terms, lambda source: store.state[source][key], squared=True)
