"""The bare recurrence of `delta_scan` over chunks of T steps, with its own backward.

    S_t = diag(exp(g_t)) S_{t-1} + beta_t k_t e_t^T        e_t = v_t - k_t^T diag(exp(g_t)) S_{t-1}        o_t = S_t^T q_t

Glossary ("rows" are the value heads of the sequences of a block):

| symbol     | meaning                                                                | shape                          |
|------------|------------------------------------------------------------------------|--------------------------------|
| qk         | read-out vectors, then input vectors, of a chunk                       | (rows, chunks, 2, T, dk)       |
| products   | q_t . k_s and k_t . k_s, decayed from after step s to step t: s <= t   | (rows, chunks, 2, T, T)        |
|            | for those of q, s < t for those of k, else 0                           |                                |
| errors     | e: what was to be written, less what k reads                           | (rows, chunks, T, dv)          |
| written    | beta e                                                                 | (rows, chunks, T, dv)          |
| inverse    | of the unit triangular matrix I + (products of k) diag(beta)           | (rows, chunks, T, T)           |
| reads      | qk, decayed from before the chunk to their step                        | as qk                          |
| writes     | k, decayed from after its step to the end of the chunk                 | (rows, chunks, T, dk)          |
| whole      | decay over the whole chunk                                             | (rows, chunks, dk or 1, 1)     |
| states     | before each chunk and after the last                                   | (rows, chunks + 1, dk, dv)     |
| adjoint    | derivative of the loss with respect to states                          | as states                      |

Forward, per chunk with the state S before it: errors = inverse (v - reads_k S), o = reads_q S + products_q written,
and the next state is whole * S + writes^T written. What depends on the kind of decay, one number per head or one per
key channel, is in `delta_decays.py`.

Source: Yang et al., *Gated Delta Networks* (arXiv 2412.06464), section 3.3, and *Parallelizing Linear Transformers with
the Delta Rule* (arXiv 2406.06484), section 3: the errors of a chunk solve one triangular system.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .delta_decays import Decays, chunk_decays


BLOCK_ENTRIES = 1 << 18  # entries of q, k and v worked on at once: they hide the cost of a call, and fit into the cache


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
    v: Tensor  # (rows, chunks, T, dv)
    beta: Tensor  # (rows, chunks, T, 1)
    factors: Tensor | None  # what q and k were multiplied by to be scaled and normalised, (rows, chunks, 2, T, 1)
    decays: Decays


class _Kept(NamedTuple):
    """What the forward pass leaves to the backward pass, of all rows or of a block."""

    states: Tensor
    errors: Tensor
    inverses: Tensor


class _Gradients(NamedTuple):
    """What the run from the last chunk to the first leaves, laid out as what it is the gradient of."""

    read: Tensor  # of what is read of the states, (rows, chunks, 2, T, dv): o, and what k reads, which is that of -v
    written: Tensor  # without what later steps of the same chunk read of it
    reads: Tensor
    writes: Tensor
    whole: Tensor  # (rows, chunks, dk)


class DeltaScan(torch.autograd.Function):
    """The recurrence on chunks; keeps a state per chunk, the errors and the inverses, and computes the rest again.

    Heads and sequences are processed in blocks, which fit into the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Arguments of `delta_scan` and the state before the first step -> o, as v, and the state after the last."""
        batch, length, heads, dv = v.shape
        T = options.chunk_size
        chunks = -(-length // T)
        out = v.new_empty(v.shape, dtype=options.dtype)
        kept = _Kept(
            state.new_empty(batch, heads, chunks + 1, *state.shape[2:]),
            state.new_empty(batch, heads, chunks, T, dv),
            state.new_empty(batch, heads, chunks, T, T),
        )
        kept.states[:, :, 0] = state
        for block in _blocks(k, v):
            chunk = _load(block, options, q, k, v, g, beta)
            products = chunk.decays.products(chunk.qk)
            own = _of_block(kept, block)
            own.inverses.copy_(_unit_inverse(products[:, :, 1] * chunk.beta.mT))
            o = _run(chunk, own)
            _flat(o).baddbmm_(_flat(products[:, :, 0]), _flat(own.errors * chunk.beta))
            _store(o, out[block.of_value])
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.options = options
        return out, kept.states[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        """Run from the last chunk to the first, then compute the gradients inside the chunks."""
        *inputs, states, errors, inverses = ctx.saved_tensors
        kept, options = _Kept(states, errors, inverses), ctx.options
        grad_q, grad_k, grad_v, grad_g, grad_beta = grads = [torch.empty_like(tensor) for tensor in inputs]
        grad_state = torch.empty_like(grad_last)
        repeats = grad_v.shape[2] // grad_k.shape[2]
        for block in _blocks(grad_k, grad_v):
            chunk, own = _load(block, options, *inputs), _of_block(kept, block)
            products = chunk.decays.products(chunk.qk)
            grad_o = _into_chunks(grad_out[block.of_value], options)
            back, first = _run_back(chunk, own, products, grad_o, grad_last[block.of_state].flatten(0, 1))
            grad_state[block.of_state] = first.view(grad_state[block.of_state].shape)
            written = _flat(own.errors * chunk.beta)
            grad_products = torch.bmm(_flat(back.read).flatten(1, 2), written.mT).view_as(products)
            grad_written = _flat(back.written).baddbmm_(_flat(products[:, :, 1]).mT, _flat(back.read[:, :, 1]))
            grad_qk, of_g = chunk.decays.gradients(
                chunk.qk, products, grad_products, back.reads, back.writes, back.whole
            )
            _undo_factors(grad_qk, chunk.qk, chunk.factors, options)
            by_key_head = grad_qk if repeats == 1 else grad_qk.unflatten(0, (-1, repeats)).sum(1)
            _store(by_key_head[:, :, 0], grad_q[block.of_key])
            _store(by_key_head[:, :, 1], grad_k[block.of_key])
            _store(back.read[:, :, 1].neg(), grad_v[block.of_value])
            _store(of_g, grad_g[block.of_value])
            _store((grad_written.view_as(own.errors) * own.errors).sum(-1), grad_beta[block.of_value])
        return *grads, grad_state, None


def _run(chunk: _Chunks, own: _Kept) -> Tensor:
    """Fill the states and the errors from the first chunk to the last; return reads_q S, (rows, chunks, T, dv)."""
    S, e, inverses = own
    reads, writes, T = chunk.decays.reads(chunk.qk), chunk.decays.writes(chunk.qk), e.shape[2]
    read = chunk.v.new_empty(chunk.v.shape)
    for j in range(e.shape[1]):
        both = torch.bmm(reads[:, j].flatten(1, 2), S[:, j])  # (rows, 2 T, dv)
        read[:, j] = both[:, :T]
        torch.bmm(inverses[:, j], chunk.v[:, j] - both[:, T:], out=e[:, j])
        torch.mul(chunk.decays.whole[:, j], S[:, j], out=S[:, j + 1])
        S[:, j + 1].baddbmm_(writes[:, j].mT, e[:, j] * chunk.beta[:, j])
    return read


def _run_back(
    chunk: _Chunks, own: _Kept, products: Tensor, grad_o: Tensor, grad_last: Tensor
) -> tuple[_Gradients, Tensor]:
    """The gradients that need the adjoint states, and the adjoint of the state before the first chunk."""
    S, e, inverses = own
    reads, writes = chunk.decays.reads(chunk.qk), chunk.decays.writes(chunk.qk)
    back = _Gradients(
        grad_o.new_empty(*grad_o.shape[:2], 2, *grad_o.shape[2:]),
        torch.bmm(_flat(products[:, :, 0]).mT, _flat(grad_o)).view_as(grad_o),
        torch.empty_like(reads),
        torch.empty_like(writes),
        reads.new_empty(*reads.shape[:2], reads.shape[-1]),
    )
    back.read[:, :, 0] = grad_o
    adjoint = grad_last
    for j in range(grad_o.shape[1] - 1, -1, -1):
        back.written[:, j].baddbmm_(writes[:, j], adjoint)
        torch.bmm(e[:, j] * chunk.beta[:, j], adjoint.mT, out=back.writes[:, j])
        torch.sum(S[:, j] * adjoint, -1, out=back.whole[:, j])
        grad_e = back.written[:, j] * chunk.beta[:, j]
        torch.neg(torch.bmm(inverses[:, j].mT, grad_e), out=back.read[:, j, 1])
        grad_read = back.read[:, j].flatten(1, 2)  # (rows, 2 T, dv)
        torch.bmm(grad_read, S[:, j].mT, out=back.reads[:, j].flatten(1, 2))
        adjoint = torch.baddbmm(chunk.decays.whole[:, j] * adjoint, reads[:, j].flatten(1, 2).mT, grad_read)
    return back, adjoint


def _blocks(k: Tensor, v: Tensor) -> list[_Block]:
    """Heads and sequences in blocks of about BLOCK_ENTRIES entries of q, k and v: of whole sequences, or of one."""
    batch, _, key_heads, _ = k.shape
    repeats = v.shape[2] // key_heads
    per_key_head = max(1, 2 * repeats * k[0, :, 0].numel() + v[0, :, :repeats].numel())
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
    values, decays, betas = (_into_chunks(tensor[block.of_value], options) for tensor in (v, g, beta))
    repeats = v.shape[2] // k.shape[2]
    qk = values.new_empty(*values.shape[:2], 2, values.shape[2], k.shape[-1])
    for i, vectors in enumerate((q, k)):
        chunks = _into_chunks(vectors[block.of_key], options)
        qk.unflatten(0, (-1, repeats))[:, :, :, i] = chunks[:, None]
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


def _of_block(kept: _Kept, block: _Block) -> _Kept:
    """The rows of a block, as views."""
    return _Kept(*(tensor[block.of_state].flatten(0, 1) for tensor in kept))


def _into_chunks(tensor: Tensor, options: Options) -> Tensor:
    """(batch, length, heads, ...) -> (batch * heads, chunks, T, ... or 1), with zeros at the end, which change nothing."""
    if tensor.dim() == 3:
        tensor = tensor[..., None]
    missing = -tensor.shape[1] % options.chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, missing))
    tensor = tensor.transpose(1, 2).to(options.dtype).contiguous()
    return tensor.flatten(0, 1).unflatten(1, (-1, options.chunk_size))


def _store(chunks: Tensor, target: Tensor) -> None:
    """(batch * heads, chunks, T, ...) -> target (batch, length, heads, ...)."""
    batch, length, heads = target.shape[:3]
    rows = chunks.flatten(1, 2)[:, :length].unflatten(0, (batch, heads))
    target.copy_(rows.transpose(1, 2).view(target.shape))


def _flat(tensor: Tensor) -> Tensor:
    """(rows, chunks, ...) -> (rows * chunks, ...), a view."""
    return tensor.flatten(0, 1)


def _unit_inverse(matrices: Tensor) -> Tensor:
    """The inverses of I + the part of (..., T, T) matrices below the diagonal."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.solve_triangular(matrices, identity.expand_as(matrices), upper=False, unitriangular=True)
