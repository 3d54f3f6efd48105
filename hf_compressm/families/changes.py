"""What a cut of a layer changes: parameters with their moments, and attributes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from hf_compressm.families.values import HasValue, Mapped, as_written


@dataclass(frozen=True, eq=False)
class MomentTerm:
    """One summand of a new parameter's optimizer moment: a linear map of an old parameter's moment.

    Attributes:
        source: the old parameter.
        matrix: map along `dim` in a form of `maps.py`; second moments take the squared entries of a matrix.
        dim: axis of the moment that is mapped.
    """

    source: nn.Parameter
    matrix: Tensor
    dim: int


@dataclass(frozen=True, eq=False)
class ParameterChange(HasValue):
    """One parameter of a cut: what it was, what it becomes, and how its optimizer moments follow.

    Attributes:
        name: dotted name in the model.
        parameter: the present parameter.
        value: the new tensor, float64 or in the parameter's own dtype; see `mapped`.
        moments: the terms whose sum is the new moment. Moments are averages of gradients, so they are mapped by the
            adjoint of the change of basis: where the old state is `h = T h_r`, the gradient is `T^H g`.
        row_map: what the change does to axis 0, for LoRA around a projection to follow: float64 `(new, old)`, a
            plain number, or int64 `(new,)`, the old entries that stay; None for anything else.
    """

    name: str
    parameter: nn.Parameter
    value: Tensor
    moments: tuple[MomentTerm, ...]
    row_map: Tensor | None = None

    @classmethod
    def mapped(
        cls, name: str, parameter: nn.Parameter, matrix: Tensor, dim: int, moments: tuple[MomentTerm, ...]
    ) -> "ParameterChange":
        """A change whose value is a map of the parameter, computed whenever it is read; it takes no memory until then.

        Args:
            name: dotted name in the model.
            parameter: the present parameter.
            matrix: map along `dim` in a form of `maps.py`; also the `row_map`, if it is one.
            dim: axis of the parameter that is mapped, at least 0.
            moments: as in the class.
        """
        value: Any = Mapped(matrix, dim)
        return cls(name, parameter, value, moments, matrix if dim == 0 and matrix.dim() <= 2 else None)

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to other processes: a map instead of a value, or a value as it will be written."""
        return {**vars(self), "value": as_written(vars(self)["value"], self.parameter.dtype)}


def with_values(changes: Iterable[ParameterChange], values: Mapping[int, Tensor]) -> tuple[ParameterChange, ...]:
    """The changes, with other values for some parameters, by their `id`."""
    return tuple(
        replace(one, value=values[id(one.parameter)]) if id(one.parameter) in values else one for one in changes
    )


@dataclass(frozen=True, eq=False)
class ParameterAddition:
    """A parameter that a layer gets with its first cut.

    Attributes:
        name: dotted name in the model.
        module: its owner, whose class has room for it under the last part of the name.
        value: the tensor, float64.
        beside: an existing parameter whose dtype, device, `requires_grad` and optimizer group it takes.
    """

    name: str
    module: nn.Module
    value: Tensor
    beside: nn.Parameter

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to other processes: the value as it will be written."""
        return {**vars(self), "value": as_written(self.value, self.beside.dtype)}


@dataclass(frozen=True, eq=False)
class AttributeChange:
    """An attribute or buffer that follows a cut, such as `mixer.ssm_state_size` or `x_proj.out_features`."""

    module: nn.Module
    name: str
    value: Any
