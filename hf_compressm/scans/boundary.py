"""The states at the boundaries of chunks, one after the other: the sequential part of `diagonal_scan`.

    s_0 given        s_{j+1} = decay * s_j + v_j

Glossary (one step is one chunk of discrete time):

| symbol        | meaning                                                            | shape                     |
|---------------|--------------------------------------------------------------------|---------------------------|
| decay         | lambda^T, what T steps without input multiply a state with, complex | (N,)                     |
| v, inputs     | what the inputs of a chunk add to the state after it, complex      | (batch, chunks, N)        |
| s, states     | states before the first chunk and after each, complex              | (batch, chunks + 1, N)    |
| g, adjoint    | gradient of the loss with respect to s, through later states too   | (batch, chunks + 1, N)    |

There are two implementations, with equal results up to round-off. The loop below runs everywhere, in one PyTorch
operation per chunk. On a GPU that operation takes longer to launch than to run; there the kernels of
`boundary_triton.py` run instead, in one launch for all chunks, if Triton is installed and a small trial of them
succeeds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transforms import is_transformed


logger = logging.getLogger(__name__)

KERNEL_DEVICES = frozenset({"cuda"})  # device types on which Triton is tried; ROCm has this name too
TRIAL_ROUND_OFF = 1000  # units in the last place of the largest entry: 20 steps leave a few, a mistake leaves millions


def boundary_scan(decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
    """The states s_0 = initial_state, s_{j+1} = decay * s_j + v_j; differentiable once in every argument.

    Inside a transform of `torch.func` the loop runs in operations that autograd records, which can be transformed.

    Args:
        decay: Complex, (N,).
        inputs: v, complex, (batch, chunks, N).
        initial_state: Complex, (batch, N).

    Returns:
        States, complex, (batch, chunks + 1, N).
    """
    if not is_transformed():
        return _BoundaryScan.apply(decay, inputs, initial_state)
    states = [initial_state]
    for added in inputs.unbind(1):
        states.append(decay * states[-1] + added)
    return torch.stack(states, dim=1)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `boundary_scan` runs in one launch on a device, in a complex dtype, here; the first call tries it."""
    return not is_transformed() and _find_kernel(device, dtype) is not None


class _BoundaryScan(torch.autograd.Function):
    """The recurrence with its own backward: by the kernel if it works, otherwise by the loop."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
        """Decay (N,), inputs (batch, chunks, N), initial state (batch, N) -> (batch, chunks + 1, N), all complex."""
        # The loop takes one operation for one chunk and none for an empty tensor: a kernel saves nothing.
        is_long = inputs.shape[1] > 1 and inputs.numel() > 0
        kernel = _find_kernel(inputs.device, inputs.dtype) if is_long else None
        run = boundary_states if kernel is None else kernel.boundary_states
        states = run(decay, inputs, initial_state)
        ctx.kernel = kernel
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of decay, inputs and initial state, by the implementation that ran forward."""
        run = boundary_adjoint if ctx.kernel is None else ctx.kernel.boundary_adjoint
        decay, states = ctx.saved_tensors
        adjoint, grad_decay = run(decay, states, grad_states)
        return grad_decay, adjoint[:, 1:], adjoint[:, 0]


def boundary_states(decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
    """The states by the loop, s_{j+1} = decay * s_j + v_j; arguments and result of `boundary_scan`."""
    batch, chunks, state_size = inputs.shape
    states = inputs.new_empty(batch, chunks + 1, state_size)
    states[:, 0] = initial_state
    for j in range(chunks):
        torch.addcmul(inputs[:, j], decay, states[:, j], out=states[:, j + 1])
    return states


def boundary_adjoint(decay: Tensor, states: Tensor, grad_states: Tensor) -> tuple[Tensor, Tensor]:
    """The adjoint recurrence g_j = grad_j + conj(decay) * g_{j+1} by the loop, from the last chunk to the first.

    Returns:
        The adjoint, (batch, chunks + 1, N): its entries from 1 on are the gradient of v, entry 0 that of s_0. And the
        gradient of decay, (N,): the sum of conj(s_j) * g_{j+1} over batch and chunks.
    """
    adjoint = grad_states.clone(memory_format=torch.contiguous_format)  # (batch, chunks + 1, N)
    conjugate = decay.conj().resolve_conj()
    for j in range(adjoint.shape[1] - 2, -1, -1):
        adjoint[:, j].addcmul_(conjugate, adjoint[:, j + 1])
    return adjoint, (states[:, :-1].conj() * adjoint[:, 1:]).sum(dim=(0, 1))


@functools.cache
def _find_kernel(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels if it gives the loop's results on a device; None, with one warning, if it fails there."""
    try:
        if device.type not in KERNEL_DEVICES or importlib.util.find_spec("triton") is None:
            return None
        kernel = importlib.import_module(f"{__package__}.boundary_triton")
        error = _largest_error(kernel, device, dtype)
    except Exception as exception:  # no C compiler, a GPU too old, a driver that does not fit: each raises its own
        reason = f"{type(exception).__name__}: {exception}"
    else:
        if error <= TRIAL_ROUND_OFF:  # in this form a NaN fails
            return kernel
        reason = f"its results are off by {error:.0f} units in the last place"
    logger.warning(
        f"The Triton kernel of diagonal scans (S5 and LRU layers) does not work on {device} in {dtype}. A slower loop "
        f"with the same results runs in its place. The reason: {reason}"
    )
    return None


@torch.no_grad()
def _largest_error(kernel: ModuleType, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of the kernel, forward and backward, in units in the last place of the largest entry.

    The trial has 2 sequences of 18 chunks, not a whole number of tiles, and 2 blocks of states, one of them almost
    empty. Nothing is random: a trial must not change what a user's seed gives.
    """
    batch, chunks, state_size = 2, 18, 33
    real = dtype.to_real()

    def wave(*shape: int) -> Tensor:
        phase = torch.arange(2 * math.prod(shape), dtype=real, device=device)
        return torch.view_as_complex(torch.sin(phase).view(*shape, 2))

    decay = torch.polar(*(torch.linspace(0, end, state_size, dtype=real, device=device) for end in (1, 6)))
    inputs, initial_state, grad_states = (
        wave(*shape) for shape in ((batch, chunks, state_size), (batch, state_size), (batch, chunks + 1, state_size))
    )
    states = boundary_states(decay, inputs, initial_state)
    expected = states, *boundary_adjoint(decay, states, grad_states)
    actual = (
        kernel.boundary_states(decay, inputs, initial_state),
        *kernel.boundary_adjoint(decay, states, grad_states),
    )
    errors = [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error)) / torch.finfo(real).eps
