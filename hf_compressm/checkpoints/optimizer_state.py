"""A saved optimizer state, matched to its parameters without the optimizer itself.

A saved state numbers parameters in the order in which the optimizer got them, and does not hold their names. The order
is known where the Trainer made the optimizer (parameters with weight decay, then those without), or where it got all
parameters of the model in one group; FSDP, and optimizers made from named parameters, save names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_compressm.surgery import misfit
from hf_compressm.utils.checks import quoted


class SavedOptimizer(torch.optim.Optimizer):
    """An optimizer that holds saved parameter groups and state for a cut to change; it cannot train.

    Args:
        groups: saved groups, with the parameters of a model in place of numbers or names.
        state: saved state by parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], state: Mapping[nn.Parameter, dict[str, Any]]) -> None:
        """Store both unchanged: `load_state_dict` would change the moments' dtype."""
        super().__init__(groups, {})
        for parameter, own in state.items():
            self.state[parameter] = own

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Refuse: the update rule of the state is not known."""
        raise NotImplementedError("This optimizer only holds what was saved; it cannot train.")


def restore_saved(saved: Any, model: nn.Module) -> SavedOptimizer:
    """Match a saved optimizer state to the parameters of a model.

    Args:
        saved: from `Optimizer.state_dict`, or FSDP's optimizer state dict.
        model: the model that was trained, with the sizes that it was saved with.

    Raises:
        ValueError: if it is not an optimizer state, or it is not certain which parameters it belongs to.
    """
    groups, states = _parts(saved)
    places = _places(groups, model)
    restored = [{**group, "params": [places[key] for key in group["params"]]} for group in groups]
    strangers = [key for key in states if key not in places]
    if strangers:
        raise ValueError(f"It has state for {quoted(strangers[0])}, which is in none of its groups.")
    optimizer = SavedOptimizer(restored, {places[key]: dict(state) for key, state in states.items()})
    problem = misfit(optimizer)
    if problem:
        raise ValueError(f"Its moments are not those of the model's parameters in the Trainer's order: {problem}.")
    return optimizer


def to_saved(optimizer: SavedOptimizer, saved: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state of a restored optimizer, in the form in which it was saved.

    Args:
        optimizer: from `restore_saved`, after a cut.
        saved: the argument of `restore_saved`.
        model: the model after the cut.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        if "param_names" in group:
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
    packed = optimizer.state_dict()
    if not _by_name(saved["param_groups"]):
        return {**saved, **packed}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in packed["param_groups"]]
    states = {order[number]: state for number, state in packed["state"].items()}
    return {**saved, "state": states, "param_groups": groups}


def fill_with_zeros(optimizer: SavedOptimizer) -> None:
    """Give parameters without state the zeros of before their first step: FSDP does not load a state with gaps.

    Raises:
        ValueError: if this kind of state does not begin with zeros of the parameter's shape.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pattern = next((parameter for parameter in held if optimizer.state.get(parameter)), None)
    if pattern is None:
        return
    for parameter in held:
        if optimizer.state.get(parameter):
            continue
        for key, value in optimizer.state[pattern].items():
            known = isinstance(value, Tensor) and (value.shape == pattern.shape or value.dim() == 0)
            if not known:
                raise ValueError(f"FSDP needs state for every parameter, and {key!r} of a new one is not known.")
            size = parameter.shape if value.shape == pattern.shape else ()
            optimizer.state[parameter][key] = torch.zeros(size, dtype=value.dtype)


def _parts(saved: Any) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Groups and states of a saved state; raises `ValueError` for another form."""
    parts: Any = saved if isinstance(saved, Mapping) else {}
    groups, states = parts.get("param_groups"), parts.get("state")
    fine = isinstance(groups, list) and groups and isinstance(states, Mapping)
    fine = fine and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
    if not fine or not all(isinstance(state, Mapping) for state in states.values()):
        raise ValueError("It does not hold the state of a torch optimizer.")
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, int | str) for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("Its groups do not number each parameter once.")
    return groups, states


def _places(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[Any, nn.Parameter]:
    """The parameter of every number or name in the groups."""
    named = dict(model.named_parameters())
    keys = [key for group in groups for key in group["params"]]
    names = keys if _by_name(groups) else [name for group in groups for name in group.get("param_names") or ()]
    if names:
        absent = [name for name in names if name not in named]
        if absent or len(names) != len(keys) or len(set(names)) != len(names):
            raise ValueError(
                f"It names parameters that the model does not have, such as {quoted(absent[0] if absent else names)}."
            )
        return {key: named[name] for key, name in zip(keys, names, strict=True)}
    sizes = [len(group["params"]) for group in groups]
    for order in (_trainer_order(model), [list(named.values())]):
        if [len(group) for group in order] == sizes:
            parameters = [parameter for group in order for parameter in group]
            return dict(zip(keys, parameters, strict=True))
    raise ValueError(
        f"Its groups have {sizes} parameters, and those that a Trainer makes for this model have "
        f"{[len(group) for group in _trainer_order(model)]}: some parameters were frozen, or the groups are of your "
        "own, so it is not known which moments belong to which parameter."
    )


def _trainer_order(model: nn.Module) -> list[list[nn.Parameter]]:
    """The groups that `Trainer.create_optimizer` makes: with weight decay, and without."""
    decayed = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))  # it uses only the model
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[parameter for name, parameter in trained if (name in decayed) is wanted] for wanted in (True, False)]


def _by_name(groups: Sequence[Mapping[str, Any]]) -> bool:
    return all(isinstance(key, str) for group in groups for key in group["params"])
