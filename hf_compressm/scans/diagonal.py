"""The diagonal linear time-invariant recurrence of S5 and LRU layers, in discrete time.

    h_k = diag(lambda) h_{k-1} + B u_k        y_k = Re(C h_k)

Glossary (discrete time):

| symbol        | meaning                                                            | shape                     |
|---------------|--------------------------------------------------------------------|---------------------------|
| u             | input sequence, real                                               | (batch, length, H)        |
| eigenvalues   | lambda, complex                                                    | (N,)                      |
| B, C          | input and read-out matrices, complex                               | (N, H), (P, N)            |
| h             | state, complex                                                     | (batch, N)                |
| T             | steps per chunk                                                    |                           |
| markov        | K_k = Re(C diag(lambda)^k B), the response k steps after an input  | (T, P, H)                 |
| within        | block Toeplitz matrix of the Markov parameters                     | (T * H, T * P)            |
| write         | what the inputs of a chunk add to its last state, [Re, Im]         | (T * H, N * 2)            |
| read          | what the state before a chunk adds to its outputs, [Re, Im]        | (N * 2, T * P)            |

The fast scan never stores the states of the sequence. Inside a chunk of T steps, inputs act on outputs through matrix
products alone. Only the states at the chunk boundaries are computed one after the other, in `boundary.py`: on a GPU by
a Triton kernel if it works, otherwise by a loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundary import boundary_scan, has_kernel


class _ChunkMatrices(NamedTuple):
    """The real matrices that one chunk is multiplied with; see the glossary of this file."""

    within: Tensor  # (T, H, T, P)
    write: Tensor  # (T, H, N, 2)
    read: Tensor  # (N, 2, T, P)
    powers: Tensor  # (T + 1, N) complex, lambda^0 ... lambda^T


def diagonal_scan(
    u: Tensor,
    eigenvalues: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a complex diagonal linear time-invariant system over a batch of real sequences.

    h_k = diag(eigenvalues) h_{k-1} + B u_k, y_k = Re(C h_k), in chunks of T steps of matrix products: time
    O(batch * length * (N (H + P) + T H P)), memory O(batch * length / T * N). No assumption on the eigenvalues: 0,
    angle 0 and modulus 1 are exact, with exact gradients. Differentiable once with respect to every tensor argument.

    Args:
        u: Input, real, (batch, length, H), length at least 1. bfloat16 and float16 are computed in float32.
        eigenvalues: Complex, (N,).
        B: Input matrix, complex, (N, H).
        C: Read-out matrix, complex, (P, N).
        initial_state: State before the first step that is run, complex, (batch, N); zero if None.
        return_last_state: Also return the state after the last step that is run.
        reverse: Run from the end of the sequence to its start; `y[:, k]` then depends on `u[:, k:]`.

    Returns:
        y, real, (batch, length, P), in the dtype of u; with `return_last_state` also the last state, complex,
        (batch, N).

    Raises:
        ValueError: If a shape or a dtype is not as above.

    Source: the chunk-wise form of a linear recurrence, e.g. Dao and Gu, *Transformers are SSMs* (arXiv 2405.21060),
    section 6, here with a decay that does not depend on time.
    """
    _check_arguments(u, eigenvalues, B, C, initial_state)
    with torch.autocast(device_type=u.device.type, enabled=False):
        sequence, eigenvalues, B, C, state = _to_common_dtype(u, eigenvalues, B, C, initial_state)
        if reverse:
            sequence = sequence.flip(1)
        y, last_state = _chunked_scan(sequence, eigenvalues, B, C, state)
        y = (y.flip(1) if reverse else y).to(u.dtype)
    return (y, last_state) if return_last_state else y


def diagonal_scan_reference(
    u: Tensor,
    eigenvalues: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence as it is written, one step at a time; arguments and results of `diagonal_scan`.

    h_k = diag(eigenvalues) h_{k-1} + B u_k, y_k = Re(C h_k). Slow; differentiated by autograd. The tests compare
    with it.

    Args:
        u: Input, real, (batch, length, H).
        eigenvalues: Complex, (N,).
        B: Input matrix, complex, (N, H).
        C: Read-out matrix, complex, (P, N).
        initial_state: Complex, (batch, N); zero if None.
        return_last_state: Also return the state after the last step that is run.
        reverse: Run from the end of the sequence.

    Returns:
        y (batch, length, P), or (y, last state (batch, N)).

    Raises:
        ValueError: If a shape or a dtype is not as above.
    """
    _check_arguments(u, eigenvalues, B, C, initial_state)
    sequence, eigenvalues, B, C, h = _to_common_dtype(u, eigenvalues, B, C, initial_state)
    steps = range(u.shape[1])
    outputs = {}
    for k in reversed(steps) if reverse else steps:
        h = eigenvalues * h + sequence[:, k].to(h.dtype) @ B.T  # (batch, N)
        outputs[k] = (h @ C.T).real  # (batch, P)
    y = torch.stack([outputs[k] for k in steps], dim=1).to(u.dtype)
    return (y, h) if return_last_state else y


@torch.no_grad()
def diagonal_states(
    u: Tensor,
    eigenvalues: Tensor,
    B: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> Iterator[Tensor]:
    """Yield the states of h_k = diag(eigenvalues) h_{k-1} + B u_k, chunk by chunk, without gradients.

    For calibration: only one chunk of states exists at a time. Chunks come in the order of the run (with `reverse`,
    the first chunk holds the end of the sequence, its first entry being the state at the last position).

    Args:
        u: Input, real, (batch, length, H).
        eigenvalues: Complex, (N,).
        B: Input matrix, complex, (N, H).
        chunk_size: Steps per chunk, at least 1; the last chunk may be shorter.
        initial_state: State before the first step that is run, complex, (batch, N); zero if None.
        reverse: Run from the end of the sequence.

    Yields:
        Complex states, (batch, chunk, N), a tensor of its own for each chunk.

    Raises:
        ValueError: If a shape, a dtype or `chunk_size` is not as above.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it is a number of steps and must be at least 1.")
    _check_arguments(u, eigenvalues, B, None, initial_state)
    sequence, eigenvalues, B, _, h = _to_common_dtype(u, eigenvalues, B, None, initial_state)
    if reverse:
        sequence = sequence.flip(1)
    for start in range(0, u.shape[1], chunk_size):
        chunk = sequence[:, start : start + chunk_size]
        states = chunk.to(B.dtype) @ B.T  # (batch, chunk, N)
        for k in range(states.shape[1]):
            h = states[:, k].addcmul_(eigenvalues, h)
        h = h.clone()
        yield states


def _chunked_scan(
    u: Tensor, eigenvalues: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan whole chunks, then the rest of the sequence as one shorter chunk with the same matrices."""
    length, H = u.shape[1:]
    P = C.shape[0]
    steps = _choose_chunk_size(length, H, P, C.shape[1], has_kernel(u.device, C.dtype))
    matrices = _chunk_matrices(eigenvalues, B, C, steps)
    whole = length - length % steps
    y, state = _run_chunks(u[:, :whole], matrices, initial_state)
    if whole == length:
        return y, state
    rest = length - whole
    shorter = _ChunkMatrices(
        matrices.within[:rest, :, :rest],
        matrices.write[steps - rest :],
        matrices.read[:, :, :rest],
        matrices.powers[: rest + 1],
    )
    y_rest, state = _run_chunks(u[:, whole:], shorter, state)
    return torch.cat([y, y_rest], dim=1), state


def _run_chunks(u: Tensor, matrices: _ChunkMatrices, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the chunk matrices to a length that is a multiple of T; return y and the last state."""
    batch, length, H = u.shape
    steps, P = matrices.read.shape[2:]
    state_size = initial_state.shape[1]
    chunks = length // steps
    rows = u.reshape(batch * chunks, steps * H)
    added = (rows @ matrices.write.reshape(steps * H, state_size * 2)).view(batch, chunks, state_size, 2)
    states = boundary_scan(matrices.powers[-1], torch.view_as_complex(added), initial_state)
    before = torch.view_as_real(states[:, :-1]).reshape(batch * chunks, state_size * 2)
    from_state = before @ matrices.read.reshape(state_size * 2, steps * P)
    y = torch.addmm(from_state, rows, matrices.within.reshape(steps * H, steps * P))
    return y.view(batch, length, P), states[:, -1]


def _chunk_matrices(eigenvalues: Tensor, B: Tensor, C: Tensor, steps: int) -> _ChunkMatrices:
    """Build the matrices of a chunk of `steps` steps from products only, so that zero eigenvalues have a gradient."""
    H, P = B.shape[1], C.shape[0]
    powers = _powers(eigenvalues, steps)  # (T + 1, N)
    driven = powers[:steps, :, None] * B  # (T, N, H): lambda^k B
    write = torch.view_as_real(driven.flip(0).transpose(1, 2))  # (T, H, N, 2)
    seen = C.T[:, None, :] * powers.T[:, :, None]  # (N, T + 1, P): C lambda^t
    read = torch.stack([seen.real, -seen.imag], dim=1)  # (N, 2, T + 1, P)
    rows = torch.stack([B.real, B.imag], dim=-1).permute(1, 0, 2).reshape(H, -1)  # (H, N * 2)
    markov = (rows @ read[:, :, :steps].reshape(rows.shape[1], steps * P)).view(H, steps, P).transpose(0, 1)
    padded = F.pad(markov, (0, 0, 0, 0, 0, 1))  # (T + 1, H, P); entry T is the zero above the diagonal
    step = torch.arange(steps, device=B.device)
    lag = step[None, :] - step[:, None]  # [from, to]
    lag = torch.where(lag < 0, steps, lag).reshape(-1)
    within = padded.index_select(0, lag).view(steps, steps, H, P).transpose(1, 2)  # (T, H, T, P)
    return _ChunkMatrices(within, write, read[:, :, 1:], powers)


def _powers(eigenvalues: Tensor, highest: int) -> Tensor:
    """lambda^0 ... lambda^highest, (highest + 1, N), by doubling: products only, exact at 0, error O(log highest)."""
    powers = torch.stack([torch.ones_like(eigenvalues), eigenvalues])
    while powers.shape[0] <= highest:
        powers = torch.cat([powers, powers[1:] * powers[-1]])
    return powers[: highest + 1]


def _choose_chunk_size(length: int, H: int, P: int, state_size: int, one_launch: bool) -> int:
    """Steps per chunk: long enough to make the boundary recurrence cheap, short enough for the T H P products.

    With the loop, a chunk costs a PyTorch operation. Measured, forward plus backward, seconds of one core:
    N=256, H=P=8, batch 50, length 784: 0.053 (T=16), 0.051 (32), 0.055 (64), 0.081 (128). N=384, H=P=128, batch 8,
    length 1024: 0.223 (1), 0.186 (2), 0.178 (4), 0.200 (8).

    With the kernel, which does all chunks in one launch, states cost memory traffic only. Computed, not measured:
    per step of the sequence, `within` takes T H P multiply-adds, and the states move 48 N / T bytes in complex64
    (`added` and the states are written and read; the states are read once more to be copied, and the copy is written
    and read). A GPU moves a byte in the time of about ten multiply-adds, so the sum is least at T = sqrt(480 N / H P),
    which is 32 and 2 for the layers above. T is at least 2, which halves what is stored and the steps that wait for
    each other.
    """
    if one_launch:
        best = math.isqrt(480 * state_size // max(H * P, 1))
        target = 2 ** max(1, min(5, best.bit_length() - 1))  # a power of two often divides the length
    else:
        target = loop_chunk_size(H, P)
    return min(target, length)


def loop_chunk_size(H: int, P: int) -> int:
    """Steps per chunk, a power of two, where a chunk costs a PyTorch operation; measured in `_choose_chunk_size`."""
    return 32 if H * P <= 1024 else (8 if H * P <= 8192 else 4)


def _to_common_dtype(
    u: Tensor, eigenvalues: Tensor, B: Tensor, C: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments in one precision, at least float32; zeros for a missing initial state, B for a missing C."""
    given = [tensor for tensor in (u, eigenvalues, B, C, initial_state) if tensor is not None]
    is_double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in given)
    dtype, complex_dtype = (torch.float64, torch.complex128) if is_double else (torch.float32, torch.complex64)
    if initial_state is None:
        initial_state = torch.zeros(u.shape[0], eigenvalues.shape[0], dtype=complex_dtype, device=u.device)
    return (
        u.to(dtype),
        eigenvalues.to(complex_dtype),
        B.to(complex_dtype),
        B if C is None else C.to(complex_dtype),
        initial_state.to(complex_dtype),
    )


def _check_arguments(
    u: Tensor, eigenvalues: Tensor, B: Tensor, C: Tensor | None, initial_state: Tensor | None
) -> None:
    """Raise a ValueError that names the offending value and what is expected."""
    if u.dim() != 3 or not u.is_floating_point() or u.shape[1] < 1:
        raise ValueError(f"u is {u.dtype} {tuple(u.shape)}; expected real (batch, length, H) with length at least 1.")
    batch, _, H = u.shape
    if eigenvalues.dim() != 1:
        raise ValueError(f"eigenvalues has shape {tuple(eigenvalues.shape)}; expected (N,).")
    state_size = eigenvalues.shape[0]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "eigenvalues": (eigenvalues, (state_size,)),
        "B": (B, (state_size, H)),
    }
    if C is not None:
        expected["C"] = (C, (C.shape[0] if C.dim() else 0, state_size))
    if initial_state is not None:
        expected["initial_state"] = (initial_state, (batch, state_size))
    for name, (tensor, shape) in expected.items():
        if not tensor.is_complex():
            raise ValueError(f"{name} is {tensor.dtype}; expected a complex dtype (use `.to(torch.complex64)`).")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} with u {tuple(u.shape)} and "
                f"{state_size} eigenvalues."
            )
