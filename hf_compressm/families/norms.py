"""What runs between a recurrence and the output projection of its layer: gates and norms, to be differentiated.

The statistics of norms count as constants there. What a channel passes on is its own factor; that it also changes the
root mean square of all is left out. Other derivatives, those of a training step, are what they would be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


_STATISTICS = frozenset(
    {
        torch.rsqrt,
        Tensor.rsqrt,
        torch.sqrt,
        Tensor.sqrt,
        torch.var,
        Tensor.var,
        torch.std,
        Tensor.std,
        torch.norm,
        Tensor.norm,
        torch.linalg.vector_norm,
    }
)


class AfterRecurrence(TorchFunctionMode):
    """Lets gradients pass by the scale of a norm, and the mean of a layer norm, where that is wanted.

    Args:
        weight: of the output projection, which a layer may use without calling the projection.
        heard: is then given the projection's input and the weight, and returns the input.

    Attributes:
        is_on: whether a recurrence has run and its output projection has not.
    """

    def __init__(self, weight: Any, heard: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.heard, self.is_on = weight, heard, False
        self._constant = False

    @contextmanager
    def constant_norms(self) -> Iterator[None]:
        """Take the statistics as constants in derivatives meanwhile."""
        self._constant = True
        try:
            yield
        finally:
            self._constant = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, or what stands for it."""
        kwargs = kwargs or {}
        if not self.is_on:
            return function(*args, **kwargs)
        if function in _STATISTICS:
            return self._passed(function(*args, **kwargs), constant=False)
        if function in _NORMS:
            result = function(*args, **kwargs)
            linear = _NORMS[function](result.detach(), *args, **kwargs)
            return self._passed(result, constant=False) + self._passed(linear - linear.detach(), constant=True)
        if function is F.linear and len(args) > 1 and args[1] is self.weight:
            args = (self.heard(args[0], args[1]), *args[1:])
        return function(*args, **kwargs)

    def _passed(self, result: Tensor, constant: bool) -> Tensor:
        """A result through which gradients pass only where statistics are constants, or only where they are not."""
        if result.requires_grad:
            result.register_hook(
                lambda gradient: gradient if self._constant == constant else torch.zeros_like(gradient)
            )
        return result


def _rms_norm(
    result: Tensor, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`x w / rms`."""
    square = _wide(x).square().mean(_last(normalized_shape), keepdim=True)
    return _scaled(x, square + (torch.finfo(x.dtype).eps if eps is None else eps), weight)


def _layer_norm(
    result: Tensor,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`x w / deviation`."""
    return _scaled(x, _wide(x).var(_last(normalized_shape), correction=0, keepdim=True) + eps, weight)


def _group_norm(
    result: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The same for each of several groups of channels, `(batch, channels, ...)`."""
    variance = _wide(x).unflatten(1, (num_groups, -1)).flatten(2).var(2, correction=0)  # (batch, groups)
    shape = (-1, x.shape[1], *[1] * (x.dim() - 2))
    variance = variance.repeat_interleave(x.shape[1] // num_groups, dim=1).view(shape)
    return _scaled(x, variance + eps, None if weight is None else weight.view(shape))


def _normalize(result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`x / |x|`; a zero passes nothing on."""
    scale = torch.where(x == 0, torch.zeros_like(x), result / x).detach()
    return x * scale


def _wide(x: Tensor) -> Tensor:
    """A constant, in float32 at least."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _last(shape: Any) -> tuple[int, ...]:
    """As many last axes as a shape has."""
    return tuple(range(-len(shape), 0))


def _scaled(x: Tensor, square: Tensor, weight: Tensor | None) -> Tensor:
    """`x w / sqrt(square)`."""
    x = x * square.rsqrt().to(x.dtype)
    return x if weight is None else x * weight


_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.normalize: _normalize,
}
