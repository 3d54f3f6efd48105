"""The bare recurrence of `ssd_scan` over chunks of T steps, with its own backward.

    h_t = exp(log_decay_t) h_{t-1} + drive_t B_t^T        y_t = h_t C_t

Glossary (heads of one group side by side are "rows": rows = heads / groups * head_dim):

| symbol     | meaning                                                     | shape                                |
|------------|-------------------------------------------------------------|--------------------------------------|
| drive      | the factor of the input vector B_t                          | (batch, chunks, T, heads, head_dim)  |
| log_decay  | logarithm of the factor on the state                        | (batch, chunks, T, heads)            |
| B, C       | input and read-out vectors                                  | (batch, chunks, T, groups, N)        |
| states     | before each chunk and after the last                        | (batch, chunks + 1, groups, rows, N) |
| within     | decay from after step s to step t for s <= t, else 0        | (batch, chunks, heads, T, T)         |
| from_start | decay from before the chunk to step t                       | (batch, chunks, T, heads, 1)         |
| to_end     | decay from after step t to the end of the chunk             | (batch, chunks, T, heads, 1)         |
| whole      | decay over the whole chunk                                  | (batch, chunks, groups, rows, 1)     |
| adjoint    | derivative of the loss with respect to states               | as states                            |

Forward, per chunk with the state S before it: y = (within * C B^T) drive + from_start * C S^T, and the next state is
whole * S + (to_end * drive)^T B. Backward, the products are the transposes of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compressm.utils.devices import summing_dtype

from .operators import Recurrence, like, register, zeros_if_missing


BLOCK_ENTRIES = 1 << 18  # entries of drive worked on at once: they hide the cost of a call, and fit into the cache
GPU_BLOCK_ENTRIES = 1 << 23  # where calls cost more; all that a block needs at a time is about half a GiB
FLOOR_SHARE = 0.9  # of the logarithm of the smallest normal number: smaller factors are slow and make no difference


class _Decays(NamedTuple):
    """The factors of some chunks; see the glossary of this file."""

    within: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor


def _run(drive: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked arguments and the state before the first chunk -> y, as drive, the state after the last, and all states.

    One state per chunk is kept; the T x T matrices are computed again in the backward pass. The batch is processed in
    blocks of a few sequences, which fit into the cache.
    """
    chunks, head_dim, groups = drive.shape[1], drive.shape[4], B.shape[3]
    y, last_state, states = _run_shapes(drive, log_decay, B, C, state)
    states[:, 0] = state.reshape(states[:, 0].shape)
    for block in _blocks(drive):
        x, b, c, s = drive[block], B[block].transpose(2, 3), C[block].transpose(2, 3), states[block]
        decays = _decays(log_decay[block], groups, head_dim)
        written = torch.matmul(_by_group(x * decays.to_end, groups).mT, b)  # (block, chunks, groups, rows, N)
        for j in range(chunks):
            torch.addcmul(written[:, j], decays.whole[:, j], s[:, j], out=s[:, j + 1])
        read = _by_head(torch.matmul(c, s[:, :-1].mT), head_dim)
        inside = torch.matmul(_weighted(decays.within, b, c), x.transpose(2, 3)).transpose(2, 3)
        torch.addcmul(inside, read, decays.from_start, out=y[block])
    last_state.copy_(states[:, -1].view(state.shape))
    return y, last_state, states


def _run_back(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    drive: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the adjoint states from the last chunk to the first, then the gradients inside the chunks."""
    grad_y = zeros_if_missing(grad_y, drive, drive.shape)
    grad_last = zeros_if_missing(grad_last, drive, state.shape)
    head_dim, groups = drive.shape[4], B.shape[3]
    grad_drive, grad_log_decay, grad_B, grad_C, grad_state = like(drive, log_decay, B, C, state)
    for block in _blocks(drive):
        x, b, c, s = drive[block], B[block].transpose(2, 3), C[block].transpose(2, 3), states[block]
        g = grad_y[block]
        decays = _decays(log_decay[block], groups, head_dim)
        grad_read = g * decays.from_start
        read = _by_head(torch.matmul(c, s[:, :-1].mT), head_dim)
        from_start = (grad_read * read).sum(-1)  # (block, chunks, T, heads)
        grad_read = _by_group(grad_read, groups)
        grad_c = torch.matmul(grad_read, s[:, :-1])
        adjoint = _adjoint(torch.matmul(grad_read.mT, c), decays.whole, grad_last[block])
        grad_state[block] = adjoint[:, 0].reshape(grad_state[block].shape)
        whole = (adjoint[:, 1:] * s[:, :-1]).sum(-1, keepdim=True) * decays.whole
        whole = whole.flatten(2).unflatten(2, (-1, head_dim)).sum(-1)  # (block, chunks, heads)
        grad_b = torch.matmul(_by_group(x * decays.to_end, groups), adjoint[:, 1:])
        grad_x = _by_head(torch.matmul(b, adjoint[:, 1:].mT), head_dim) * decays.to_end
        to_end = (x * grad_x).sum(-1)  # (block, chunks, T, heads)

        g_by_head = g.transpose(2, 3).contiguous()  # (block, chunks, heads, T, head_dim)
        grad_weights = torch.matmul(g_by_head, x.permute(0, 1, 3, 4, 2))  # (block, chunks, heads, T, T)
        weights = _weighted(decays.within, b, c)
        grad_x += torch.matmul(weights.mT, g_by_head).transpose(2, 3)
        inside = weights.mul_(grad_weights)
        grad_scores = grad_weights.mul_(decays.within).unflatten(2, (groups, -1)).sum(3)
        grad_C[block] = grad_c.add_(torch.matmul(grad_scores, b)).transpose(2, 3)
        grad_B[block] = grad_b.add_(torch.matmul(grad_scores.mT, c)).transpose(2, 3)
        grad_drive[block] = grad_x
        grad_log_decay[block] = _grad_log_decay(inside, from_start, to_end, whole)
    return grad_drive, grad_log_decay, grad_B, grad_C, grad_state


def _run_shapes(
    drive: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `_run`, not filled."""
    batch, chunks, _, heads, head_dim = drive.shape
    groups, state_size = B.shape[3:]
    states = drive.new_empty((batch, chunks + 1, groups, heads // groups * head_dim, state_size))
    return drive.new_empty(drive.shape), state.new_empty(state.shape), states


_recurrence = register(
    "ssd_recurrence",
    Recurrence(
        _run,
        _run_back,
        shapes=_run_shapes,
        backward_shapes=lambda grad_y, grad_last, *saved: like(*saved[:5]),
        tensors=5,
        results=2,
    ),
)


def chunked_scan(
    drive: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(log_decay_t) h_{t-1} + drive_t B_t^T, y_t = h_t C_t, in chunks of `chunk_size` steps.

    Args:
        drive: (batch, length, heads, head_dim).
        log_decay: (batch, length, heads).
        B: (batch, length, groups, N).
        C: (batch, length, groups, N).
        state: State before the first step, (batch, heads, head_dim, N).
        chunk_size: Steps per chunk, T.

    Returns:
        y, as drive, and the state after the last step.
    """
    length = drive.shape[1]
    log_decay = log_decay.clamp(min=smallest_exponent(log_decay.dtype))
    chunked = (_into_chunks(tensor, chunk_size) for tensor in (drive, log_decay, B, C))
    y, last_state, _ = _recurrence(*chunked, state)
    return y.flatten(1, 2)[:, :length], last_state


def states_after_chunks(
    drive: Tensor, log_decay: Tensor, B: Tensor, state: Tensor, chunk_size: int
) -> Iterator[Tensor]:
    """Yield the states after every whole chunk, (batch, heads, head_dim, N), each a tensor of its own.

    Each is yielded once the next is computed from it, so that it may be written to.

    Args:
        drive: (batch, length, heads, head_dim).
        log_decay: (batch, length, heads).
        B: (batch, length, groups, N).
        state: State before the first step, (batch, heads, head_dim, N).
        chunk_size: Steps per chunk, T.
    """
    groups, head_dim = B.shape[2], drive.shape[3]
    log_decay = log_decay.clamp(min=smallest_exponent(log_decay.dtype))
    for start in range(0, drive.shape[1] - chunk_size + 1, chunk_size):
        x, logarithms, b = (tensor[:, None, start : start + chunk_size] for tensor in (drive, log_decay, B))
        decays = _decays(logarithms, groups, head_dim)
        written = torch.matmul(_by_group(x * decays.to_end, groups).mT, b.transpose(2, 3))[:, 0]
        after = written.addcmul_(decays.whole[:, 0], state.reshape(written.shape)).view(state.shape)
        if start:
            yield state
        state = after
    if drive.shape[1] >= chunk_size:
        yield state


def _blocks(drive: Tensor) -> list[slice]:
    """The batch in slices of about BLOCK_ENTRIES entries of drive each, on a GPU GPU_BLOCK_ENTRIES."""
    batch = drive.shape[0]
    entries = BLOCK_ENTRIES if drive.device.type == "cpu" else GPU_BLOCK_ENTRIES
    rows = max(1, entries // max(1, math.prod(drive.shape[1:])))
    return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def _into_chunks(tensor: Tensor, steps: int) -> Tensor:
    """(batch, length, ...) -> (batch, chunks, steps, ...), with zeros at the end: no input, no decay."""
    missing = -tensor.shape[1] % steps
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.unflatten(1, (-1, steps))


def smallest_exponent(dtype: torch.dtype) -> float:
    """The exponent below which exp counts as zero."""
    return FLOOR_SHARE * math.log(torch.finfo(dtype).smallest_normal)


def _decays(log_decay: Tensor, groups: int, head_dim: int) -> _Decays:
    """The factors of some chunks, from exponents that are never positive where log_decay is not.

    Exponents are differences of sums, in which small terms get lost beside large ones: the sums are in float64, where
    the device has it.
    """
    dtype = log_decay.dtype
    sums = torch.cumsum(
        log_decay.transpose(2, 3).to(summing_dtype(log_decay.device)), dim=-1
    )  # (batch, chunks, heads, T)

    def factors(exponents: Tensor) -> Tensor:
        return exponents.to(dtype).clamp(min=smallest_exponent(dtype)).exp_()

    within = factors((sums[..., :, None] - sums[..., None, :]).tril_()).tril_()  # before exp too: s > t would overflow
    from_start = factors(sums.transpose(2, 3))[..., None]
    whole = from_start[:, :, -1].expand(-1, -1, -1, head_dim).flatten(2).unflatten(2, (groups, -1))[..., None]
    to_end = factors(sums[..., -1:] - sums).transpose(2, 3)[..., None]
    return _Decays(within, from_start, to_end, whole)


def _weighted(within: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The weights of a chunk's inputs in its outputs, within * C B^T, (batch, chunks, heads, T, T)."""
    scores = torch.matmul(C, B.mT)  # (batch, chunks, groups, T, T)
    return (within.unflatten(2, (B.shape[2], -1)) * scores[:, :, :, None]).flatten(2, 3)


def _grad_log_decay(inside: Tensor, from_start: Tensor, to_end: Tensor, whole: Tensor) -> Tensor:
    """The derivative with respect to log_decay, (batch, chunks, T, heads), from those with respect to the exponents.

    log_decay_k is part of the exponents within[t, s] with s < k <= t, from_start[t] with k <= t, to_end[s] with s < k,
    and whole. The cheaper y . grad_y - drive . grad_drive gives the same, but is a small difference of large numbers
    if the decay is fast. The sums of `inside` are in float64, because they still form a difference.
    """
    inside = inside.tril_(-1)
    wide = summing_dtype(inside.device)
    difference = inside.sum(-1, dtype=wide) - inside.sum(-2, dtype=wide)
    later = from_start + difference.transpose(2, 3)
    earlier = to_end.cumsum(2) - to_end
    return (later.flip(2).cumsum(2).flip(2) + earlier + whole[:, :, None]).to(to_end.dtype)


def _adjoint(grad_states: Tensor, whole: Tensor, grad_last: Tensor) -> Tensor:
    """adjoint_j = grad_states_j + whole_j adjoint_{j+1}, run from the last chunk to the first."""
    batch, chunks, *state = grad_states.shape
    adjoint = grad_states.new_empty(batch, chunks + 1, *state)
    adjoint[:, -1] = grad_last.reshape(adjoint[:, -1].shape)
    for j in range(chunks - 1, -1, -1):
        torch.addcmul(grad_states[:, j], whole[:, j], adjoint[:, j + 1], out=adjoint[:, j])
    return adjoint


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """(batch, chunks, T, heads, head_dim) -> (batch, chunks, groups, T, rows)."""
    return tensor.flatten(3).unflatten(3, (groups, -1)).transpose(2, 3)


def _by_head(tensor: Tensor, head_dim: int) -> Tensor:
    """(batch, chunks, groups, T, rows) -> (batch, chunks, T, heads, head_dim)."""
    return tensor.transpose(2, 3).flatten(3).unflatten(3, (-1, head_dim))
