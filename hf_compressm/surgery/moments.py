"""The kinds of entries in an optimizer's state.

| kind of state | examples | how it follows |
|---|---|---|
| first moment | AdamW and Lion `exp_avg`, SGD `momentum_buffer` | the adjoint map of the change, `M m` |
| second moment | AdamW `exp_avg_sq`, Adagrad `sum`, RMSprop `square_avg` | its squared magnitude, `|M|^2 v` |
| factored second moment | Adafactor `exp_avg_sq_row`, `exp_avg_sq_col` | `|M|^2` on the factor that has the axis |
| per-parameter scalar | `step`, `RMS` | kept |

A complex parameter's moments are complex too: the first one is a number, the second one holds the squares of the
gradient's real part and of its imaginary part (`torch.optim` steps such a parameter as a pair of real ones).

State of a parameter with any other entry is reset as a whole: 8-bit and 4-bit blocks, GaLore's and APOLLO's
projections, the averaged weights of schedule-free optimizers, RMSprop with momentum (whose average of normalised
steps does not follow a change of basis) or centred (whose variance could become negative).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn


Role = Literal["first", "second", "row", "column"]

ROLES: dict[str, Role] = {
    "exp_avg": "first",
    "momentum_buffer": "first",
    "exp_avg_sq": "second",
    "max_exp_avg_sq": "second",
    "square_avg": "second",
    "sum": "second",
    "exp_avg_sq_row": "row",
    "exp_avg_sq_col": "column",
}

FACTORS: frozenset[Role] = frozenset({"row", "column"})
"""Roles of entries that average over an axis; those of complex numbers do not follow a map that mixes their parts."""

BITSANDBYTES: dict[str, dict[str, Role]] = {
    "adam": {"state1": "first", "state2": "second"},
    "lamb": {"state1": "first", "state2": "second"},
    "lion": {"state1": "first"},
    "momentum": {"state1": "first"},
    "lars": {"state1": "first"},
    "adagrad": {"state1": "second"},
    "rmsprop": {"state1": "second"},
}
"""Roles by the `optimizer_name` of a bitsandbytes optimizer; entries in 8 bits have no role, whatever their name."""


def roles_of(optimizer: torch.optim.Optimizer) -> Mapping[str, Role]:
    """The entries of this optimizer's state that a cut knows how to map."""
    if isinstance(optimizer, torch.optim.RMSprop):
        return {"square_avg": "second"}
    if type(optimizer).__module__.startswith("bitsandbytes."):
        return BITSANDBYTES.get(getattr(optimizer, "optimizer_name", ""), {})
    return ROLES


def unknown_entry(state: Mapping[str, Any], parameter: nn.Parameter, roles: Mapping[str, Role]) -> str | None:
    """Name of the first entry of a parameter's state that no rule covers, or None."""
    for key, value in state.items():
        if _is_object(value):
            return key
        if not isinstance(value, Tensor):
            continue
        known = key in roles and is_whole(value) and fits(roles[key], value, parameter)
        if value.numel() > 1 and not (known and _follows_parts(roles[key], value, parameter)):
            return key
    return None


def _follows_parts(role: Role, value: Tensor, parameter: nn.Parameter) -> bool:
    """Whether a complex parameter's entry has values for its real and its imaginary part."""
    return not parameter.is_complex() or (value.is_complex() and role not in FACTORS)


def misshapen_entry(
    state: Mapping[str, Any], parameter: nn.Parameter, roles: Mapping[str, Role]
) -> tuple[str, Tensor] | None:
    """The first entry that has a role but not its shape; None if an object in the state determines the shapes."""
    if any(map(_is_object, state.values())):
        return None
    for key, value in state.items():
        if key in roles and isinstance(value, Tensor) and not fits(roles[key], value, parameter):
            return key, value
    return None


def _is_object(value: Any) -> bool:
    """Whether an entry may have tensors of its own, as GaLore's projector has."""
    return not (value is None or isinstance(value, Tensor | bool | int | float | str))


def is_whole(value: Tensor) -> bool:
    """Whether a tensor holds plain numbers, not quantised ones."""
    return type(value) in (Tensor, nn.Parameter) and (value.is_floating_point() or value.is_complex())


def fits(role: Role, value: Tensor, parameter: nn.Parameter) -> bool:
    """Whether an entry has the shape that its role gives it."""
    if role in ("first", "second"):
        return value.shape == parameter.shape
    if role == "row":
        return value.shape == parameter.shape[:-1]
    return value.shape == parameter.shape[:-2] + parameter.shape[-1:]


def fresh_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """The state with which an optimizer begins for a parameter: empty, except for Adagrad, which fills it at once."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    start = group["initial_accumulator_value"]
    return dict(torch.optim.Adagrad([parameter], initial_accumulator_value=start).state[parameter])
