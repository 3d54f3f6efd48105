"""The recurrence of `boundary.py` as Triton kernels: one launch forward, one launch backward.

    s_{j+1} = decay * s_j + v_j        g_j = grad_j + conj(decay) * g_{j+1}

| symbol  | meaning                                                            | shape                   |
|---------|--------------------------------------------------------------------|-------------------------|
| decay   | what a chunk of input 0 multiplies a state with, complex           | (N,)                    |
| v       | what the inputs of a chunk add to the state after it, complex      | (batch, chunks, N)      |
| s       | states before the first chunk and after each, complex              | (batch, chunks + 1, N)  |
| g       | adjoint states: gradient of the loss with respect to s, in total   | (batch, chunks + 1, N)  |
| row     | real numbers from one chunk to the next in memory, 2 N             |                         |
| n       | the states of a program                                            | (BLOCK,)                |

A program owns BLOCK states of one sequence, one per thread, in registers from the first chunk to the last. It waits
only for memory, which takes several hundred cycles, while a step takes eight: therefore TILE steps are loaded together
before the first is computed. Triton has no complex type; tensors come as `torch.view_as_real` shows them, and a thread
moves the two parts of its state in one access. Only features of Triton 3.5 are used.

`boundary.py` imports this file if Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


BLOCK = 32  # one warp: small, so that batch * N / BLOCK programs fill a GPU, and without barriers between warps
TILE = 8  # with 16 the compiler runs out of the 255 registers of a thread, backward in float64


def boundary_states(decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
    """s_0 given, s_{j+1} = decay * s_j + v_j, in one launch; arguments and result of `boundary.boundary_states`."""
    batch, chunks, state_size = inputs.shape
    states = torch.empty(batch, chunks + 1, state_size, dtype=inputs.dtype, device=inputs.device)
    tensors = [_real(decay), _real(inputs), _real(initial_state), torch.view_as_real(states)]
    _launch(_states_kernel, tensors, batch, chunks, state_size)
    return states


def boundary_adjoint(decay: Tensor, states: Tensor, grad_states: Tensor) -> tuple[Tensor, Tensor]:
    """g_j = grad_j + conj(decay) * g_{j+1}, in one launch; arguments and results of `boundary.boundary_adjoint`.

    Each sequence writes its own part of the gradient of decay. They are added here: the order of the additions, and
    with it the last bit, is the same in every run.
    """
    batch, boundaries, state_size = states.shape
    adjoint = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    parts = torch.empty(batch, state_size, dtype=states.dtype, device=states.device)
    tensors = [_real(decay), _real(states), _real(grad_states), *map(torch.view_as_real, (adjoint, parts))]
    _launch(_adjoint_kernel, tensors, batch, boundaries - 1, state_size)
    return adjoint, parts.sum(dim=0)


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as contiguous real numbers, (..., 2); a lazy conjugation is carried out."""
    return torch.view_as_real(tensor.resolve_conj().contiguous())


def _launch(kernel: triton.JITFunction, tensors: list[Tensor], batch: int, chunks: int, state_size: int) -> None:
    """Run a kernel over all sequences and blocks of states, on the device of the tensors."""
    grid = (batch, triton.cdiv(state_size, BLOCK))
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, wherever the tensors are
        # A fused multiply-add halves the arithmetic that the next step waits for.
        kernel[grid](*tensors, chunks, state_size, TILE=TILE, BLOCK=BLOCK, num_warps=1, enable_fp_fusion=True)


@triton.jit
def _load(pointer, n, exists):
    """Real and imaginary parts of the complex numbers n from a pointer on; 0 where none exists."""
    return tl.split(tl.load(pointer + n[:, None] * 2 + tl.arange(0, 2)[None, :], mask=exists[:, None], other=0.0))


@triton.jit
def _store(pointer, n, re, im, exists):
    """The inverse of `_load`; where none exists, nothing is written."""
    tl.store(pointer + n[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(re, im), mask=exists[:, None])


@triton.jit
def _inside(exists, j, chunks):
    """`exists & (j < chunks)`, in a form that Triton's interpreter can use as a mask, too."""
    return tl.where(exists, j, chunks) < chunks


# Lengths are not specialised: Triton would compile anew for a length of 1 and for multiples of 16.
@triton.jit(do_not_specialize=["chunks", "state_size"])
def _states_kernel(decay, inputs, initial_state, states, chunks, state_size, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The states of one block of one sequence, from the first chunk to the last."""
    sequence = tl.program_id(0).to(tl.int64)  # the tensors may have more than 2^31 entries
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = n < state_size
    row = state_size * 2
    inputs += sequence * chunks * row
    states += sequence * (chunks + 1) * row
    decay_re, decay_im = _load(decay, n, exists)
    re, im = _load(initial_state + sequence * row, n, exists)
    _store(states, n, re, im, exists)
    first = 0
    while first < chunks:  # not `range`: NumPy 2.4 and the interpreter of Triton 3.5 disagree about it
        added = ()
        for k in tl.static_range(TILE):
            added += (_load(inputs + k * row, n, _inside(exists, first + k, chunks)),)
        for k in tl.static_range(TILE):
            added_re, added_im = added[k]
            re, im = added_re + decay_re * re - decay_im * im, added_im + decay_re * im + decay_im * re
            _store(states + (k + 1) * row, n, re, im, _inside(exists, first + k, chunks))
        inputs += TILE * row
        states += TILE * row
        first += TILE


@triton.jit(do_not_specialize=["chunks", "state_size"])
def _adjoint_kernel(
    decay, states, grad_states, adjoint, grad_decay, chunks, state_size, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """The adjoint states of one block of one sequence, from the last chunk to the first; its part of grad_decay."""
    sequence = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = n < state_size
    row = state_size * 2
    last = (sequence * (chunks + 1) + chunks) * row
    states += last
    grad_states += last
    adjoint += last
    decay_re, decay_im = _load(decay, n, exists)
    re, im = _load(grad_states, n, exists)
    _store(adjoint, n, re, im, exists)
    sum_re, sum_im = tl.zeros_like(re), tl.zeros_like(im)
    first = 0
    while first < chunks:
        grads = ()
        befores = ()
        for k in tl.static_range(1, TILE + 1):  # k chunks back
            grads += (_load(grad_states - k * row, n, _inside(exists, first + k - 1, chunks)),)
            befores += (_load(states - k * row, n, _inside(exists, first + k - 1, chunks)),)
        for k in tl.static_range(1, TILE + 1):
            before_re, before_im = befores[k - 1]
            sum_re += before_re * re + before_im * im  # conj(s_j) g_{j+1}
            sum_im += before_re * im - before_im * re
            grad_re, grad_im = grads[k - 1]
            re, im = grad_re + decay_re * re + decay_im * im, grad_im + decay_re * im - decay_im * re
            _store(adjoint - k * row, n, re, im, _inside(exists, first + k - 1, chunks))
        states -= TILE * row
        grad_states -= TILE * row
        adjoint -= TILE * row
        first += TILE
    _store(grad_decay + sequence * row, n, sum_re, sum_im, exists)
