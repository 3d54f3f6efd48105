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

import math
from types import ModuleType

import torch
from torch import Tensor

from .operators import Recurrence, like, register, zeros_if_missing
from .transforms import is_transformed
from .trials import Trial, working_kernel


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
        return _recurrence(decay, inputs, initial_state)
    states = [initial_state]
    for added in inputs.unbind(1):
        states.append(decay * states[-1] + added)
    return torch.stack(states, dim=1)


@torch.compiler.assume_constant_result
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `boundary_scan` runs in one launch on a device, in a complex dtype, here; the first call tries it."""
    return not is_transformed() and working_kernel(TRIAL, device, dtype) is not None


def _run(decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
    """`boundary_scan` by the kernel if it works, otherwise by the loop."""
    kernel = _kernel_for(inputs)
    run = boundary_states if kernel is None else kernel.boundary_states
    return run(decay, inputs, initial_state)


def _run_back(grad_states: Tensor | None, decay: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of decay, inputs and initial state."""
    kernel = _kernel_for(states[:, 1:])
    run = boundary_adjoint if kernel is None else kernel.boundary_adjoint
    adjoint, grad_decay = run(decay, states, zeros_if_missing(grad_states, states, states.shape))
    of_inputs, of_initial_state = (
        part.clone(memory_format=torch.contiguous_format) for part in (adjoint[:, 1:], adjoint[:, 0])
    )
    return grad_decay, of_inputs, of_initial_state


def _kernel_for(inputs: Tensor) -> ModuleType | None:
    """The kernels, if they work and save anything: the loop has one operation per chunk, none for an empty tensor."""
    is_long = inputs.shape[1] > 1 and inputs.numel() > 0
    return working_kernel(TRIAL, inputs.device, inputs.dtype) if is_long else None


def _run_shapes(decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
    """The output of `_run`, not filled."""
    batch, chunks, state_size = inputs.shape
    return inputs.new_empty((batch, chunks + 1, state_size))


def _run_back_shapes(grad_states: Tensor | None, decay: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `_run_back`, not filled."""
    return like(decay, states[:, 1:], states[:, 0])


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


def _trial_results(kernel: ModuleType | None, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """States, adjoint and gradient of decay of a small problem, by a kernel or by the loop.

    It has 2 sequences of 18 chunks, not a whole number of tiles, and 2 blocks of states, one of them almost empty.
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
    run, run_back = (boundary_states, boundary_adjoint)
    if kernel is not None:
        run, run_back = kernel.boundary_states, kernel.boundary_adjoint
    states = run(decay, inputs, initial_state)
    return [states, *run_back(decay, states, grad_states)]


TRIAL = Trial("boundary_triton", "diagonal scans (S5 and LRU layers)", _trial_results)

_recurrence = register(
    "diagonal_recurrence",
    Recurrence(
        _run,
        _run_back,
        shapes=_run_shapes,
        backward_shapes=_run_back_shapes,
        tensors=3,
        results=1,
        saved=lambda inputs, results, kept: (inputs[0], *results),
    ),
)
