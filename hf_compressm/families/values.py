"""The new value of a parameter: a tensor, or a map of the old one that is only computed when it is read.

A plan that holds maps is small, however large the parameters are: in memory, and on its way to other processes, each
of which maps its own copy of the weights, to the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.maps import apply_in_order, apply_map


@dataclass(frozen=True, eq=False)
class Mapped:
    """A value that is a map of the parameter it replaces.

    Attributes:
        matrix: map along `dim` in a form of `maps.py`.
        dim: axis of the parameter that is mapped.
    """

    matrix: Tensor
    dim: int

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The mapped parameter: as it is stored if entries are only selected, else float64 on the CPU."""
        apply = apply_in_order if self.matrix.is_floating_point() else apply_map
        return apply(parameter.detach(), self.matrix, self.dim)


class Value:
    """An attribute that holds a tensor or `Mapped`, and is read as a tensor: mapped from the `parameter` of now."""

    def __get__(self, change: Any, owner: type) -> Tensor:
        """The tensor."""
        if change is None:
            raise AttributeError("value")  # by which dataclasses know that it has no default
        held = vars(change)["value"]
        return held.of(change.parameter) if isinstance(held, Mapped) else held

    def __set__(self, change: Any, value: Tensor | Mapped) -> None:
        """Store what was given."""
        vars(change)["value"] = value


class HasValue:
    """Base of a dataclass with such an attribute among its fields."""

    value: Tensor = Value()  # type: ignore[assignment]
    parameter: nn.Parameter

    def beside(self) -> Tensor:
        """The value on the device of the parameter, for trying it: the last bits may not be those of `value`."""
        held = vars(self)["value"]
        mapped = isinstance(held, Mapped)
        return apply_map(self.parameter.detach(), held.matrix, held.dim) if mapped else held


def as_written(value: Tensor | Mapped, dtype: torch.dtype) -> Tensor | Mapped:
    """A value with no more digits than the parameter will have that it is written to."""
    return value if isinstance(value, Mapped) else value.to(dtype)
