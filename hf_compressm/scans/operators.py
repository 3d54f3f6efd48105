"""A recurrence as an operator of `torch.library`: to a compiler it is one node of the graph, whatever its length.

An operator runs forward and gives its results and, after them, what its backward pass needs. The backward pass is an
operator too. Of both there is a second form that only makes outputs of the right shapes, for a compiler that follows
shapes. Inputs may have any strides; all outputs are contiguous tensors of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


NAMESPACE = "hf_compressm"

Tensors = tuple[Any, ...]  # tensors or None, as many as an operator has


def inputs_and_kept(inputs: Tensors, results: Tensors, kept: Tensors) -> Tensors:
    """What most backward passes need."""
    return *inputs, *kept


@dataclass(frozen=True)
class Recurrence:
    """What makes an operator. The types of arguments are read from the annotations of `forward` and `backward`.

    Attributes:
        forward: `(*tensors, *numbers)` -> results, then what is kept for the backward pass.
        backward: `(*gradients of the results, *saved tensors, *numbers)` -> a gradient for each tensor, which has no
            entries for a tensor that is None. Of a result that nothing depends on the gradient is None.
        shapes: as `forward`, with outputs that are not filled.
        backward_shapes: as `backward`, with outputs that are not filled.
        tensors: how many tensors go in, those included that may be None.
        results: how many outputs of `forward` have a gradient; what is kept has none.
        saved: picks the tensors that the backward pass needs from what goes in, the results, and what is kept.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    shapes: Callable[..., Any]
    backward_shapes: Callable[..., Any]
    tensors: int
    results: int
    saved: Callable[[Tensors, Tensors, Tensors], Tensors] = inputs_and_kept


def register(name: str, recurrence: Recurrence) -> Callable[..., Any]:
    """Make the operators `hf_compressm::name` and `hf_compressm::name_backward`.

    Returns:
        The function that runs the first, differentiable once with respect to every tensor.
    """
    tensors, results = recurrence.tensors, recurrence.results
    forward = torch.library.custom_op(f"{NAMESPACE}::{name}", recurrence.forward, mutates_args=())
    backward = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward", without_autocast(recurrence.backward), mutates_args=()
    )
    forward.register_fake(recurrence.shapes)
    backward.register_fake(recurrence.backward_shapes)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*outputs[results:])
        ctx.set_materialize_grads(False)  # zeros for what is kept would take as much memory again
        ctx.is_missing, ctx.numbers = [tensor is None for tensor in inputs[:tensors]], inputs[tensors:]
        ctx.save_for_backward(*recurrence.saved(inputs[:tensors], outputs[:results], outputs[results:]))

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = backward(*grads[:results], *ctx.saved_tensors, *ctx.numbers)
        of_tensors = (None if missing else grad for missing, grad in zip(ctx.is_missing, found, strict=True))
        return *of_tensors, *(None for _ in ctx.numbers)

    forward.register_autograd(differentiate, setup_context=keep)
    return forward


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same backward pass in the dtypes of its tensors, also where it is run inside of autocast."""

    @functools.wraps(run)
    def in_own_dtypes(*arguments: Any) -> Any:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        with torch.autocast(device.type, enabled=False):
            return run(*arguments)

    return in_own_dtypes


def like(*tensors: Tensor | None) -> Any:
    """A contiguous tensor for each, not filled, and for None one without entries beside the first."""
    first = next(tensor for tensor in tensors if tensor is not None)
    return tuple(first.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors)


def zeros_if_missing(grad: Tensor | None, like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A gradient in one piece; zeros of the dtype and on the device of `like` if nothing depends on the result."""
    return like.new_zeros(shape) if grad is None else grad.contiguous()
