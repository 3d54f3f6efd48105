"""The selective scan in plain PyTorch, over chunks of a few steps, with its own backward.

    h_t = exp(delta_t A) * h_{t-1} + drive_t B_t        y_t = C_t . h_t

Glossary (time-major, and states as (N, channels), so that the innermost loops run over channels):

| symbol      | meaning                                               | shape                        |
|-------------|-------------------------------------------------------|------------------------------|
| delta       | step size                                             | (length, batch, channels)    |
| drive       | delta_t u_t, the factor of the input vector B_t       | (length, batch, channels)    |
| A           | diagonal of the continuous state matrix, real         | (N, channels)                |
| B, C        | input and read-out vectors                            | (length, batch, N)           |
| decay       | exp(delta_t A)                                        | (steps, batch, N, channels)  |
| checkpoints | the states before each chunk                          | (chunks, batch, N, channels) |
| adjoint     | derivative of the loss with respect to h_t            | as decay                     |

One state per chunk is kept, and the states of a chunk are computed again in the backward pass. The batch is processed
in blocks of a few sequences, which fit into the cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Recurrence, like, register, zeros_if_missing


CHUNK_SIZE = 16  # steps between two stored states
BLOCK_ENTRIES = 65536  # state entries worked on at once: enough to hide the cost of a call, few enough for the cache
LOG2_E = math.log2(math.e)


def chunked_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of B and C that all channels share: out, and the last state (batch, channels, N)."""
    dtype = compute_dtype(u, delta, A, B, C)
    steps = step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    inputs = u.to(dtype)
    y, last_state, _ = _recurrence(
        time_major(steps),
        time_major(inputs * steps),
        A.to(dtype).T.contiguous(),
        time_major(B.to(dtype)),
        time_major(C.to(dtype)),
    )
    out = feed_through_and_gate(y.permute(1, 2, 0), inputs, D, z)
    return out.to(u.dtype), last_state.transpose(1, 2)


def _run(delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y (length, batch, channels), the last state (batch, N, channels), and the checkpoints."""
    delta, drive, A, B, C = (tensor.contiguous() for tensor in (delta, drive, A, B, C))
    length, batch, _ = delta.shape
    y, last_state, checkpoints = _run_shapes(delta, drive, A, B, C)
    for block in _blocks(batch, A):
        decay, states = chunk_buffers(delta[:, block], A)
        states[0].zero_()
        for index, chunk in enumerate(chunks(length)):
            checkpoints[index, block] = states[0]
            count = chunk.stop - chunk.start
            a, h = decay[:count], states[: count + 1]
            fill_chunk(a, h, delta[chunk, block], drive[chunk, block], A, B[chunk, block])
            y[chunk, block] = torch.matmul(C[chunk, block, None, :], h[1:]).squeeze(-2)
            states[0] = h[-1]
        last_state[block] = states[0]
    return y, last_state, checkpoints


def _run_back(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    delta: Tensor,
    drive: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Go from the last chunk to the first: states again, then the adjoint, then the gradients of its inputs."""
    delta, drive, A, B, C = (tensor.contiguous() for tensor in (delta, drive, A, B, C))
    length, batch, _ = delta.shape
    grad_y = zeros_if_missing(grad_y, delta, delta.shape)
    grad_last = zeros_if_missing(grad_last, delta, (batch, *A.shape))
    grad_delta, grad_drive, grad_A, grad_B, grad_C = like(delta, drive, A, B, C)
    grad_A.zero_()
    for block in _blocks(batch, A):
        decay, states = chunk_buffers(delta[:, block], A)
        adjoint = torch.empty_like(decay)
        incoming = grad_last[block].clone()  # decay_{t+1} * adjoint_{t+1}
        for index, chunk in reversed(list(enumerate(chunks(length)))):
            count = chunk.stop - chunk.start
            a, h, g = decay[:count], states[: count + 1], adjoint[:count]
            step, push, out = delta[chunk, block], drive[chunk, block], grad_y[chunk, block]
            h[0] = checkpoints[index, block]
            fill_chunk(a, h, step, push, A, B[chunk, block])
            _fill_adjoint(g, a, out, C[chunk, block], incoming)
            grad_C[chunk, block] = _over_channels(out, h[1:])
            grad_B[chunk, block] = _over_channels(push, g)
            grad_drive[chunk, block] = torch.matmul(B[chunk, block, None, :], g).squeeze(-2)
            slope = a.mul_(h[:-1]).mul_(g)  # derivative with respect to delta_t A
            grad_delta[chunk, block] = torch.mul(slope, A, out=g).sum(-2)
            grad_A += slope.mul_(step[:, :, None]).sum((0, 1))
    return grad_delta, grad_drive, grad_A, grad_B, grad_C


def _run_shapes(delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `_run`, not filled."""
    length, batch, _ = delta.shape
    count = (length + CHUNK_SIZE - 1) // CHUNK_SIZE
    new = delta.new_empty
    return new(delta.shape), new((batch, *A.shape)), new((count, batch, *A.shape))


def _blocks(batch: int, A: Tensor) -> list[slice]:
    """The batch in slices of about BLOCK_ENTRIES state entries each; whole on a GPU, where more calls cost more."""
    rows = max(1, BLOCK_ENTRIES // max(1, A.numel())) if A.device.type == "cpu" else batch
    return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def chunks(length: int, chunk_size: int = CHUNK_SIZE) -> list[slice]:
    """The sequence in slices of `chunk_size` steps; the last may be shorter."""
    return [slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def chunk_buffers(delta: Tensor, A: Tensor, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor]:
    """Uninitialised buffers of a chunk: decays (steps, batch, N, channels), and states with the one before them."""
    steps, batch = min(chunk_size, delta.shape[0]), delta.shape[1]
    return delta.new_empty(steps, batch, *A.shape), delta.new_empty(1 + steps, batch, *A.shape)


def fill_chunk(decay: Tensor, states: Tensor, delta: Tensor, drive: Tensor, A: Tensor, B: Tensor) -> None:
    """Write the decays exp(delta A) of a chunk and, after the state before it in `states[0]`, its states.

    The decays are powers of two, since torch leaves `exp` to MKL, which takes three times as long as `exp2` on
    processors that are not Intel's.
    """
    torch.mul(delta[:, :, None, :], A * LOG2_E, out=decay)
    decay.exp2_()
    torch.mul(drive[:, :, None, :], B[..., None], out=states[1:])
    before, *after = states.unbind(0)
    for decay_t, state_t in zip(decay.unbind(0), after, strict=True):
        before = state_t.addcmul_(decay_t, before)


def _fill_adjoint(adjoint: Tensor, decay: Tensor, grad_y: Tensor, C: Tensor, incoming: Tensor) -> None:
    """Write adjoint_t = C_t grad_y_t + decay_{t+1} adjoint_{t+1} of one chunk, from its last step to its first.

    `incoming` holds decay_{t+1} * adjoint_{t+1} of the step after the chunk, and afterwards that of its first step.
    """
    torch.mul(grad_y[:, :, None, :], C[..., None], out=adjoint)
    adjoint[-1].add_(incoming)
    pairs = zip(adjoint.unbind(0)[-2::-1], decay.unbind(0)[:0:-1], strict=True)
    after = adjoint[-1]
    for adjoint_t, decay_after in pairs:
        after = adjoint_t.addcmul_(decay_after, after)
    torch.mul(decay[0], after, out=incoming)


def _over_channels(weights: Tensor, states: Tensor) -> Tensor:
    """Sum over channels of weights (..., channels) * states (..., N, channels) -> (..., N).

    Computed as a row times a transposed matrix: three times faster than the same product as a matrix times a column.
    """
    return torch.matmul(weights[..., None, :], states.transpose(-1, -2)).squeeze(-2)


def time_major(tensor: Tensor) -> Tensor:
    """(batch, rows, length) -> contiguous (length, batch, rows)."""
    return tensor.permute(2, 0, 1).contiguous()


def step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Delta with its bias added, passed through softplus if asked, (batch, channels, length)."""
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)[:, None]
    return F.softplus(delta) if delta_softplus else delta


def feed_through_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) * silu(z), in the dtype of y, (batch, channels, length)."""
    if D is not None:
        y = y + u * D.to(y.dtype)[:, None]
    return y if z is None else y * F.silu(z.to(y.dtype))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


_recurrence = register(
    "selective_recurrence",
    Recurrence(
        _run,
        _run_back,
        shapes=_run_shapes,
        backward_shapes=lambda grad_y, grad_last, *saved: like(*saved[:5]),
        tensors=5,
        results=2,
    ),
)
