"""Where an optimizer keeps its parameters and their state, and the optimizers that no cut can follow.

A wrapper (accelerate's, or one that steps Muon and AdamW together) shows parameters and state of the optimizers inside
of it, often by properties that are computed anew whenever they are read. A cut writes where they are stored.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer


@dataclass(frozen=True, eq=False)
class Store:
    """The groups and the state that one torch optimizer stores itself.

    Attributes:
        optimizer: the optimizer.
        groups: its parameter groups; empty if it shows those of another one.
        state: its state by parameter; empty if it shows that of another one.
    """

    optimizer: torch.optim.Optimizer
    groups: list[dict[str, Any]]
    state: MutableMapping[Any, dict[str, Any]]


def optimizers_in(optimizer: Any) -> list[torch.optim.Optimizer]:
    """All torch optimizers in a wrapper, or in a list or dict of optimizers, the outer ones before the inner ones.

    Raises:
        ValueError: if there is none.
    """
    found: dict[int, torch.optim.Optimizer] = {}
    left = [optimizer]
    while left:
        present = left.pop(0)
        if isinstance(present, torch.optim.Optimizer):
            if id(present) in found:
                continue
            found[id(present)] = present
        left += _inner(present)
    if not found:
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return list(found.values())


def stores_in(optimizer: Any) -> list[Store]:
    """Every place where an optimizer, or one inside of it, stores groups or state; each place once."""
    seen: set[int] = set()
    stores = []
    for each in optimizers_in(optimizer):
        groups, state = vars(each).get("param_groups"), vars(each).get("state")
        own = [group for group in groups if id(group) not in seen] if isinstance(groups, list) else []
        kept = state if isinstance(state, MutableMapping) and id(state) not in seen else {}
        seen |= {id(group) for group in own} | {id(kept)}
        if own or kept is state:
            stores.append(Store(each, own, kept))
    return stores


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that an optimizer shows; a wrapper may show none."""
    groups = getattr(optimizer, "param_groups", None) or ()
    return [parameter for group in groups for parameter in group["params"]]


def state_of(optimizer: torch.optim.Optimizer) -> Mapping[Any, Any]:
    """The state that an optimizer shows, by parameter; a wrapper may show none."""
    state = getattr(optimizer, "state", None)
    return state if isinstance(state, Mapping) else {}


def _inner(holder: Any) -> Iterator[Any]:
    """The optimizers that an object holds directly, or in a list, tuple or dict."""
    values = holder if isinstance(holder, list | tuple) else getattr(holder, "__dict__", {})
    values = holder if isinstance(holder, dict) else values
    for value in values.values() if isinstance(values, Mapping) else values:
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        yield from (member for member in members if isinstance(member, torch.optim.Optimizer))


def check_optimizer(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse an optimizer that holds parameters where a cut cannot replace them.

    Args:
        optimizer: a torch optimizer, a wrapper around one or several, or a list of them.
        parameters: those of the model.

    Raises:
        ValueError: naming the optimizer and the way out.
    """
    own, stores = {id(parameter) for parameter in parameters}, stores_in(optimizer)
    inner_first = optimizers_in(optimizer)[::-1]  # messages name the optimizer that is inside of accelerate's wrapper
    for each in inner_first:
        _refuse_kinds(each)
    for each in inner_first:
        strangers = [tuple(parameter.shape) for parameter in parameters_of(each) if id(parameter) not in own]
        if strangers:
            raise ValueError(
                f"{type(each).__name__} holds {len(strangers)} parameter(s) that the model does not have, the first "
                f"of shape {strangers[0]}. Pass the optimizer that trains this model, created after its last change."
            )
    stored = {id(parameter) for store in stores for group in store.groups for parameter in group["params"]}
    stateful = {id(parameter) for store in stores for parameter in store.state}
    for each in inner_first:
        extras = {name: value for name, value in vars(each).items() if name not in ("param_groups", "state")}
        place = held_parameter(extras, own)
        shown = {id(parameter) for parameter in parameters_of(each)}
        if not place and (not shown <= stored or not {id(parameter) for parameter in state_of(each)} <= stateful):
            place = "param_groups or state that it computes anew, not from torch optimizers inside of it"
        if place:
            raise ValueError(
                f"{type(each).__name__} holds parameters in {place}, where a cut cannot replace them. Keep them only "
                "in param_groups and state, as torch.optim.Optimizer does, or cut between two runs with "
                "hf_compressm.compress."
            )


def held_parameter(attributes: Mapping[str, Any], own: Set[int], depth: int = 3) -> str:
    """The first attribute with a parameter in its lists, tuples, sets and dicts, by name; "" if there is none.

    Args:
        attributes: the attributes of an object.
        own: ids of the parameters.
        depth: how many containers inside of one another are looked through.
    """
    return next((name for name, value in attributes.items() if _holds(value, own, depth)), "")


def _holds(value: Any, own: Set[int], depth: int) -> bool:
    if isinstance(value, nn.Parameter):
        return id(value) in own
    if depth == 0 or not isinstance(value, dict | list | tuple | set | frozenset):
        return False
    members = [*value, *value.values()] if isinstance(value, dict) else value
    return any(_holds(member, own, depth - 1) for member in members)


def _refuse_kinds(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` for the kinds of optimizers that are known to work outside of groups and state."""
    if isinstance(optimizer, LayerWiseDummyOptimizer):
        raise ValueError(
            "A layer-wise optimizer steps in hooks of the parameters, each with an optimizer of its own, and a cut "
            "cannot follow there. Use the variant that is not layer-wise (galore_adamw for galore_adamw_layerwise, "
            "apollo_adamw for apollo_adamw_layerwise)."
        )
    if isinstance(optimizer, torch.optim.LBFGS) or type(optimizer).__module__.partition(".")[0] == "lomo_optim":
        raise ValueError(
            f"{type(optimizer).__name__} keeps data of the parameters outside of its state, where a cut cannot change "
            "it. Use another optimizer (adamw_torch, or adafactor where memory is short), or cut between two runs "
            "with hf_compressm.compress."
        )
