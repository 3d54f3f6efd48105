"""The recurrences in a form for `torch.export` and ONNX: real numbers, any length, no loop over the steps.

    h_k = a_k * h_{k-1} + b_k

A program that is exported once for all lengths can neither unroll a loop over the steps nor choose a chunk size by
the length, and ONNX has hardly any operators on complex numbers. So the sequence is cut into chunks of T steps, with a
constant T and zeros at the end. Inside a chunk the steps are written out. The states between the chunks are found by
doubling, in a constant number of rounds: after r rounds, each state includes the 2^r chunks before it. For inference.

Glossary:

| symbol        | meaning                                                            | shape                     |
|---------------|--------------------------------------------------------------------|---------------------------|
| pair          | a complex tensor as a real one, [Re, Im] in the last dimension     | (..., 2)                  |
| u             | input sequence                                                     | (batch, length, H)        |
| eigenvalues   | of the diagonal system, pairs                                      | (N, 2)                    |
| B, C          | its input and read-out matrices, pairs                             | (N, H, 2), (P, N, 2)      |
| T             | steps per chunk                                                    |                           |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .diagonal import loop_chunk_size
from .selective_chunks import compute_dtype, feed_through_and_gate, step_sizes
from .transforms import is_exported


__all__ = ["diagonal_scan_in_pairs", "divide_pairs", "is_exported", "multiply_pairs", "selective_scan_for_export"]

ROUNDS = 20  # of doubling: chunks that are more than 2^20 back, at least 4 million steps, are forgotten
SELECTIVE_CHUNK_SIZE = 16  # all rounds together touch about as many states as there are steps


def diagonal_scan_in_pairs(u: Tensor, eigenvalues: Tensor, B: Tensor, C: Tensor, reverse: bool = False) -> Tensor:
    """`diagonal_scan` on pairs: h_k = diag(eigenvalues) h_{k-1} + B u_k, y_k = Re(C h_k), from h = 0.

    Args:
        u: Input, real, (batch, length, H), in the dtype of the other arguments.
        eigenvalues: Pairs, (N, 2), of modulus at most 1.
        B: Input matrix, pairs, (N, H, 2).
        C: Read-out matrix, pairs, (P, N, 2).
        reverse: Run from the end of the sequence to its start.

    Returns:
        y, real, (batch, length, P).
    """
    batch, length, H = u.shape
    P, N = C.shape[:2]
    steps = loop_chunk_size(H, P)
    powers = _powers(eigenvalues, steps)  # (T + 1, N, 2)
    within, write, read = _chunk_matrices(powers, B, C)
    rows = _into_chunks(u.flip(1) if reverse else u, steps).reshape(batch, -1, steps * H)
    states = (rows @ write).unflatten(-1, (N, 2))  # (batch, chunks, N, 2)
    decay = powers[-1]
    for r in range(ROUNDS):
        states = states + multiply_pairs(decay, _delayed(states, 2**r))
        decay = multiply_pairs(decay, decay)
    y = rows @ within + _delayed(states, 1).flatten(-2) @ read
    y = y.reshape(batch, -1, P)[:, :length]
    return y.flip(1) if reverse else y


def selective_scan_for_export(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in operations that can be exported; arguments and results are the same.

    All states exist at once, as in the code of transformers: memory O(batch * length * channels * N).
    """
    dtype = compute_dtype(u, delta, A, B, C)
    inputs, sizes = u.to(dtype), step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    drive = (inputs * sizes).transpose(1, 2)[..., None] * B.to(dtype).transpose(1, 2)[:, :, None]
    decay = torch.exp(sizes.transpose(1, 2)[..., None] * A.to(dtype))  # (batch, length, channels, N)
    states = _varying_recurrence(decay, drive)
    y = (states @ C.to(dtype).transpose(1, 2)[..., None]).squeeze(-1)  # (batch, length, channels)
    out = feed_through_and_gate(y.transpose(1, 2), inputs, D, z).to(u.dtype)
    return (out, states[:, -1]) if return_last_state else out


def multiply_pairs(a: Tensor, b: Tensor) -> Tensor:
    """The product a b of pairs, whose other dimensions broadcast."""
    real, imaginary, other_real, other_imaginary = a[..., 0], a[..., 1], b[..., 0], b[..., 1]
    return torch.stack(
        [real * other_real - imaginary * other_imaginary, real * other_imaginary + imaginary * other_real], dim=-1
    )


def divide_pairs(a: Tensor, b: Tensor) -> Tensor:
    """The quotient a / b of pairs, whose other dimensions broadcast."""
    conjugate = torch.stack([b[..., 0], -b[..., 1]], dim=-1)
    return multiply_pairs(a, conjugate) / (b * b).sum(-1, keepdim=True)


def _varying_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """h_k = decay_k * h_{k-1} + drive_k from h = 0, over dimension 1."""
    length = decay.shape[1]
    decays, drives = (_into_chunks(tensor, SELECTIVE_CHUNK_SIZE).unbind(2) for tensor in (decay, drive))
    products, states = [decays[0]], [drives[0]]
    for a, b in zip(decays[1:], drives[1:], strict=True):
        products.append(a * products[-1])
        states.append(a * states[-1] + b)
    product, state = products[-1], states[-1]  # of whole chunks, (batch, chunks, ...)
    for r in range(ROUNDS):
        state = state + product * _delayed(state, 2**r)
        product = product * _delayed(product, 2**r)
    before = _delayed(state, 1)
    result = torch.stack([h + p * before for p, h in zip(products, states, strict=True)], dim=2)
    return result.flatten(1, 2)[:, :length]


def _into_chunks(tensor: Tensor, steps: int) -> Tensor:
    """(batch, length, ...) -> (batch, chunks, steps, ...), with zeros after the end.

    There are at least two chunks, because `torch.export` would treat a single one as a constant.
    """
    batch, length, *others = tensor.shape
    chunks = length // steps + 2
    padded = F.pad(tensor, (0, 0) * len(others) + (0, chunks * steps - length))
    return padded.reshape(batch, chunks, steps, *others)


def _delayed(tensor: Tensor, steps: int) -> Tensor:
    """The entries `steps` places earlier along dimension 1, and zeros where there are none."""
    before_all = torch.zeros_like(tensor[:, :1])
    origin = torch.arange(1 - steps, tensor.shape[1] + 1 - steps, device=tensor.device).clamp(min=0)
    return torch.cat([before_all, tensor], dim=1).index_select(1, origin)


def _powers(eigenvalues: Tensor, highest: int) -> Tensor:
    """lambda^0 ... lambda^highest, pairs, (highest + 1, N, 2); `highest` is a power of two."""
    one = torch.stack([torch.ones_like(eigenvalues[:, 0]), torch.zeros_like(eigenvalues[:, 1])], dim=-1)
    powers = torch.stack([one, eigenvalues])
    while powers.shape[0] <= highest:
        powers = torch.cat([powers, multiply_pairs(powers[1:], powers[-1])])
    return powers


def _chunk_matrices(powers: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of a chunk: from inputs to outputs, from inputs to last state, from the state before to outputs.

    Returns:
        within (T * H, T * P), write (T * H, N * 2) and read (N * 2, T * P); see the glossary of `diagonal.py`.
    """
    steps, (N, H), P = powers.shape[0] - 1, B.shape[:2], C.shape[0]
    driven = multiply_pairs(powers[:steps, :, None], B)  # (T, N, H, 2)
    write = driven.flip(0).transpose(1, 2).reshape(steps * H, N * 2)
    seen = multiply_pairs(C.transpose(0, 1)[:, None], powers.transpose(0, 1)[:, :, None])  # (N, T + 1, P, 2)
    read = torch.stack([seen[..., 0], -seen[..., 1]], dim=1)  # (N, 2, T + 1, P)
    columns = B.transpose(0, 1).reshape(H, N * 2)
    markov = (columns @ read[:, :, :steps].reshape(N * 2, steps * P)).view(H, steps, P).transpose(0, 1)
    step = torch.arange(steps, device=B.device)
    lag = step[None, :] - step[:, None]  # [from, to]
    within = markov.index_select(0, lag.clamp(min=0).flatten()).view(steps, steps, H, P)
    within = within * (lag >= 0)[..., None, None].to(within.dtype)
    return within.transpose(1, 2).reshape(steps * H, steps * P), write, read[:, :, 1:].reshape(N * 2, steps * P)
