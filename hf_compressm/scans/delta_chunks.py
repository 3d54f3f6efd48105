"""The bare recurrence of `delta_scan` over chunks of T steps, with its own backward.

    S_t = diag(exp(g_t)) S_{t-1} + beta_t k_t e_t^T      e_t = v_t - k_t^T diag(exp(g_t)) S_{t-1}      o_t = S_t^T q_t

Glossary ("rows" are the value heads of the sequences of a block):

| symbol     | meaning                                                               | shape                          |
|------------|-----------------------------------------------------------------------|--------------------------------|
| qk         | read-out vectors, then input vectors, of a chunk                      | (chunks, rows, 2, T, dk)       |
| products   | q_t . k_s and k_t . k_s, decayed from after step s to step t: s <= t  | (chunks, rows, 2, T, T)        |
|            | for those of q, s < t for those of k, else 0                          |                                |
| errors     | e: what was to be written, less what k reads                          | (chunks, rows, T, dv)          |
| written    | beta e                                                                | (chunks, rows, T, dv)          |
| inverse    | of the unit triangular matrix I + (products of k) diag(beta)          | (chunks, rows, T, T)           |
| reads      | qk, decayed from before the chunk to their step                       | as qk                          |
| writes     | k, decayed from after its step to the end of the chunk                | (chunks, rows, T, dk)          |
| whole      | decay over the whole chunk                                            | (chunks, rows, dk or 1, 1)     |
| states     | before each chunk and after the last                                  | (chunks + 1, rows, dk, dv)     |
| adjoint    | derivative of the loss with respect to states                         | as states                      |

Forward, per chunk with the state S before it: errors = inverse (v - reads_k S), o = reads_q S + products_q written,
and the next state is whole * S + writes^T written. What depends on the kind of decay, one number per head or one per
key channel, is in `delta_decays.py`.

Source: Yang et al., *Gated Delta Networks* (arXiv 2412.06464), section 3.3, and *Parallelizing Linear Transformers
with the Delta Rule* (arXiv 2406.06484), section 3: the errors of a chunk solve one triangular system.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta_decays import Decays, chunk_decays
from .operators import Recurrence, like, register, zeros_if_missing


BLOCK_ENTRIES = 1 << 20  # entries of q, k and v worked on at once: they hide the cost of a call, and stay in the cache


class Options(NamedTuple):
    """What is not a tensor."""

    chunk_size: int
    scale: float  # of q
    epsilon: float | None  # |q|^2 and |k|^2 are raised by it before q and k are normalised; None: they are not
    dtype: torch.dtype


class _Block(NamedTuple):
    """Some heads of some sequences, as an index into tensors of three layouts."""

    of_key: tuple[slice, slice, slice]  # (batch, length, key heads, ...)
    of_value: tuple[slice, slice, slice]  # (batch, length, heads, ...)
    of_state: tuple[slice, slice]  # (batch, heads, ...)


class _Chunks(NamedTuple):
    """The arguments of a block in chunks, in the dtype of the computation; see the glossary of this file."""

    qk: Tensor
    v: Tensor  # (chunks, rows, T, dv)
    beta: Tensor  # (chunks, rows, T, 1)
    factors: Tensor | None  # what q and k were multiplied by to be scaled and normalised, (chunks, rows, 2, T, 1)
    decays: Decays


class _Signals(NamedTuple):
    """What the run from the last chunk to the first begins with."""

    grad_o: Tensor  # (chunks, rows, T, dv)
    grad_written: Tensor  # by way of o of the same chunk; the rest is added
    grad_last: Tensor  # (rows, dk, dv)


class _Gradients(NamedTuple):
    """What the run from the last chunk to the first leaves, laid out as what it is the gradient of."""

    read: Tensor  # of what is read of the states, (chunks, rows, 2, T, dv): o, and what k reads, which is that of -v
    reads: Tensor
    writes: Tensor
    whole: Tensor


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass; see the glossary of this file."""

    states: Tensor
    errors: Tensor
    inverses: Tensor


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    chunk_size: int,
    scale: float,
    epsilon: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `delta_scan` and the state before the first step -> o, as v, the last state, and what is kept.

    A state per chunk, the errors and the inverses are kept, the rest is computed again in the backward pass. Heads and
    sequences are processed in blocks, which fit into the cache.
    """
    options = Options(chunk_size, scale, epsilon, state.dtype)
    out, last, states, errors, inverses = _forward_shapes(q, k, v, g, beta, state, chunk_size, scale, epsilon)
    for block, kept in _kept_by_block(k, v, chunk_size, _Kept(states, errors, inverses)):
        chunks = _load(block, options, q, k, v, g, beta)
        products = chunks.decays.products(chunks.qk)
        kept.inverses.copy_(_unit_inverse(products[:, :, 1] * chunks.beta.mT))
        kept.states[0] = state[block.of_state].flatten(0, 1)
        o = _run(chunks, kept)
        _flat(o).baddbmm_(_flat(products[:, :, 0]), _flat(kept.errors * chunks.beta))
        _store(o, out[block.of_value])
        last[block.of_state] = kept.states[-1].view(last[block.of_state].shape)
    return out, last, states, errors, inverses


def _backward(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    errors: Tensor,
    inverses: Tensor,
    chunk_size: int,
    scale: float,
    epsilon: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run from the last chunk to the first, then compute the gradients inside the chunks."""
    options, inputs = Options(chunk_size, scale, epsilon, states.dtype), (q, k, v, g, beta)
    shapes = _backward_shapes(grad_out, grad_last, *inputs, states)
    grad_q, grad_k, grad_v, grad_g, grad_beta, grad_state = shapes
    grad_out = zeros_if_missing(grad_out, states, v.shape)
    grad_last = zeros_if_missing(grad_last, states, grad_state.shape)
    repeats = v.shape[2] // k.shape[2]
    for block, kept in _kept_by_block(k, v, chunk_size, _Kept(states, errors, inverses)):
        chunks = _load(block, options, *inputs)
        written = kept.errors * chunks.beta
        products = chunks.decays.products(chunks.qk)
        grad_o = _into_rows(_into_chunks(grad_out[block.of_value], chunk_size), options)
        grad_written = torch.bmm(_flat(products[:, :, 0]).mT, _flat(grad_o)).view_as(grad_o)
        signals = _Signals(grad_o, grad_written, grad_last[block.of_state].flatten(0, 1))
        back, first = _run_back(chunks, kept, written, signals)
        grad_state[block.of_state] = first.view(grad_state[block.of_state].shape)
        grad_products = torch.bmm(_flat(back.read).flatten(1, 2), _flat(written).mT).view_as(products)
        _flat(grad_written).baddbmm_(_flat(products[:, :, 1]).mT, _flat(back.read[:, :, 1]))
        grad_qk, of_g = chunks.decays.gradients(
            chunks.qk, products, grad_products, back.reads, back.writes, back.whole
        )
        _undo_factors(grad_qk, chunks.qk, chunks.factors, options)
        by_key_head = grad_qk if repeats == 1 else grad_qk.unflatten(1, (-1, repeats)).sum(2)
        _store(by_key_head[:, :, 0], grad_q[block.of_key])
        _store(by_key_head[:, :, 1], grad_k[block.of_key])
        _store(back.read[:, :, 1].neg(), grad_v[block.of_value])
        _store(of_g, grad_g[block.of_value])
        _store(torch.linalg.vecdot(grad_written, kept.errors), grad_beta[block.of_value])
    return grad_q, grad_k, grad_v, grad_g, grad_beta, grad_state


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk_size: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `_forward`, not filled. What is kept is flat: the parts of all blocks, one after the other."""
    batch, length, heads, dv = v.shape
    rows, dk = batch * heads, k.shape[3]
    chunks = (length + chunk_size - 1) // chunk_size
    new = state.new_empty
    states, errors = new((chunks + 1) * rows * dk * dv), new(chunks * rows * chunk_size * dv)
    return new(v.shape), new(state.shape), states, errors, new(chunks * rows * chunk_size**2)


def _backward_shapes(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    """The outputs of `_backward`, not filled."""
    batch, _, heads, dv = v.shape
    return *like(q, k, v, g, beta), states.new_empty((batch, heads, k.shape[3], dv))


delta_recurrence = register(
    "delta_recurrence",
    Recurrence(
        _forward,
        _backward,
        shapes=_forward_shapes,
        backward_shapes=_backward_shapes,
        tensors=6,
        results=2,
        saved=lambda inputs, results, kept: (*inputs[:5], *kept),
    ),
)


def _kept_by_block(k: Tensor, v: Tensor, T: int, kept: _Kept) -> Iterator[tuple[_Block, _Kept]]:
    """The blocks, each with its part of what is kept, in the shapes of the glossary."""
    dk, dv, chunks = k.shape[3], v.shape[3], -(-v.shape[1] // T)
    shapes = ((chunks + 1, dk, dv), (chunks, T, dv), (chunks, T, T))  # but for the rows
    starts = [0, 0, 0]
    for block in _blocks(k, v):
        rows = v[block.of_value][:, 0, :, 0].numel()
        parts = []
        for i, (flat, (count, *entries)) in enumerate(zip(kept, shapes, strict=True)):
            stop = starts[i] + count * rows * math.prod(entries)
            parts.append(flat[starts[i] : stop].view(count, rows, *entries))
            starts[i] = stop
        yield block, _Kept(*parts)


def _run(chunks: _Chunks, kept: _Kept) -> Tensor:
    """From the first chunk to the last: fill errors, and states after the first one, and return reads_q S."""
    v, whole = chunks.v, chunks.decays.whole
    reads, writes = chunks.decays.reads(chunks.qk), chunks.decays.writes(chunks.qk)
    states, errors, inverses = kept
    written = torch.empty_like(v[0])
    for j in range(v.shape[0]):
        torch.bmm(inverses[j], torch.baddbmm(v[j], reads[j, :, 1], states[j], alpha=-1), out=errors[j])
        torch.mul(errors[j], chunks.beta[j], out=written)
        torch.mul(whole[j], states[j], out=states[j + 1])
        states[j + 1].baddbmm_(writes[j].mT, written)
    return torch.bmm(_flat(reads[:, :, 0]), _flat(states[:-1])).view_as(v)


def _run_back(chunks: _Chunks, kept: _Kept, written: Tensor, signals: _Signals) -> tuple[_Gradients, Tensor]:
    """From the last chunk to the first: the gradients that need adjoint states, and the adjoint of the first state."""
    grad_o, grad_written, adjoint = signals
    reads, writes, decays = chunks.decays.reads(chunks.qk), chunks.decays.writes(chunks.qk), chunks.decays
    grad_read = grad_o.new_empty(*grad_o.shape[:2], 2, *grad_o.shape[2:])
    grad_read[:, :, 0] = grad_o
    grad_writes, grad_whole = torch.empty_like(writes), torch.empty_like(decays.whole)
    for j in range(grad_o.shape[0] - 1, -1, -1):
        grad_written[j].baddbmm_(writes[j], adjoint)
        torch.bmm(written[j], adjoint.mT, out=grad_writes[j])
        grad_whole[j] = decays.gradient_of_whole(kept.states[j], adjoint)
        torch.neg(torch.bmm(kept.inverses[j].mT, grad_written[j] * chunks.beta[j]), out=grad_read[j, :, 1])
        adjoint = decays.whole[j] * adjoint
        adjoint.baddbmm_(reads[j].flatten(1, 2).mT, grad_read[j].flatten(1, 2))
    grad_reads = torch.bmm(_flat(grad_read).flatten(1, 2), _flat(kept.states[:-1]).mT).view_as(reads)
    return _Gradients(grad_read, grad_reads, grad_writes, grad_whole), adjoint


def _blocks(k: Tensor, v: Tensor) -> list[_Block]:
    """Heads and sequences in blocks of about BLOCK_ENTRIES entries of q, k and v: of whole sequences, or of one."""
    batch, length, key_heads, dk = k.shape
    repeats = v.shape[2] // key_heads
    per_key_head = max(1, repeats * length * (2 * dk + v.shape[3]))
    some_heads = min(key_heads, max(1, BLOCK_ENTRIES // per_key_head))
    sequences = max(1, BLOCK_ENTRIES // (per_key_head * key_heads)) if some_heads == key_heads else 1
    blocks = []
    for row in range(0, batch, sequences):
        rows = slice(row, min(row + sequences, batch))
        for head in range(0, key_heads, some_heads):
            of_key = slice(head, min(head + some_heads, key_heads))
            heads = slice(of_key.start * repeats, of_key.stop * repeats)
            blocks.append(_Block((rows, slice(None), of_key), (rows, slice(None), heads), (rows, heads)))
    return blocks


def _load(block: _Block, options: Options, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _Chunks:
    """The arguments of a block in chunks, q and k repeated for the heads that share them, scaled and normalised."""
    T = options.chunk_size
    values, decays, betas = (_into_rows(_into_chunks(tensor[block.of_value], T), options) for tensor in (v, g, beta))
    repeats = v.shape[2] // k.shape[2]
    qk = values.new_empty(*values.shape[:2], 2, values.shape[2], k.shape[-1])
    for i, vectors in enumerate((q, k)):
        chunks = _into_chunks(vectors[block.of_key], T)  # (chunks, sequences, key heads, T, dk)
        qk.unflatten(1, (*chunks.shape[1:3], repeats))[:, :, :, :, i] = chunks[:, :, :, None]
    factors = None
    if options.epsilon is not None:
        factors = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square_().add_(options.epsilon).rsqrt_()
        factors[:, :, 0] *= options.scale
        qk *= factors
    else:
        qk[:, :, 0] *= options.scale
    return _Chunks(qk, values, betas, factors, chunk_decays(decays))


def _undo_factors(grad_qk: Tensor, qk: Tensor, factors: Tensor | None, options: Options) -> None:
    """Turn the gradient of q and k, scaled and normalised, into that of what was given, in place.

    With f = scale / sqrt(|q|^2 + epsilon), the gradient of q is f (d - y (y . d) / scale^2) for that of y = f q, d.
    """
    if factors is None:
        grad_qk[:, :, 0] *= options.scale
        return
    along = (grad_qk * qk).sum(-1, keepdim=True)
    along[:, :, 0] /= options.scale**2
    grad_qk.addcmul_(qk, along, value=-1).mul_(factors)


def _into_chunks(tensor: Tensor, T: int) -> Tensor:
    """(batch, length, heads, ...) -> (chunks, batch, heads, T, ... or 1), with zeros at the end, which do nothing."""
    if tensor.dim() == 3:
        tensor = tensor[..., None]
    missing = -tensor.shape[1] % T
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, missing))
    return tensor.unflatten(1, (-1, T)).permute(1, 0, 3, 2, 4)


def _into_rows(chunks: Tensor, options: Options) -> Tensor:
    """(chunks, batch, heads, T, ...) -> (chunks, rows, T, ...) in the dtype of the computation, contiguous."""
    return chunks.to(options.dtype).contiguous().flatten(1, 2)


def _store(chunks: Tensor, target: Tensor) -> None:
    """(chunks, batch * heads, T, ...) -> target (batch, length, heads, ...)."""
    batch, length, heads = target.shape[:3]
    T = chunks.shape[2]
    rows = chunks.reshape(-1, batch, heads, T, target[0, 0, 0].numel()).permute(1, 0, 3, 2, 4)
    target = target if target.dim() == 4 else target[..., None]
    whole = length // T
    target[:, : whole * T].unflatten(1, (whole, T)).copy_(rows[:, :whole])
    if whole * T < length:
        target[:, whole * T :] = rows[:, whole, : length - whole * T]


def _flat(tensor: Tensor) -> Tensor:
    """(chunks, rows, ...) -> (rows * chunks, ...), a view."""
    return tensor.flatten(0, 1)


def _unit_inverse(matrices: Tensor) -> Tensor:
    """The inverses of I + the part of (..., T, T) matrices below the diagonal."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.solve_triangular(matrices, identity.expand_as(matrices), upper=False, unitriangular=True)
