"""Decay inside the chunks of `delta_chunks.py`: one number per head and step, or one per key channel and step.

Glossary:

| symbol     | meaning                                                        | shape                         |
|------------|----------------------------------------------------------------|-------------------------------|
| g          | logarithm of the decay, not positive                           | (chunks, rows, T, dk or 1)    |
| from_start | decay from before the chunk to step t                          | (chunks, rows, T, dk or 1)    |
| to_end     | decay from after step t to the end of the chunk                | (chunks, rows, T, dk or 1)    |
| whole      | decay over the whole chunk                                     | (chunks, rows, dk or 1, 1)    |
| within     | decay from after step s to step t for s <= t, else 0           | (chunks, rows, T, T)          |

The others are those of `delta_chunks.py`. No factor is above 1 where g is not positive, and none is a quotient:
nothing overflows, and no sum of logarithms loses the small ones beside the large.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hf_compressm.utils.devices import summing_dtype

from .ssd_chunks import smallest_exponent


class Decays(ABC):
    """The decay inside chunks, as factors and as products of vectors, with their gradients."""

    from_start: Tensor
    to_end: Tensor
    whole: Tensor

    def reads(self, qk: Tensor) -> Tensor:
        """Q and k, decayed from before the chunk to their step."""
        return qk * self.from_start[:, :, None]

    def writes(self, qk: Tensor) -> Tensor:
        """K, decayed from after its step to the end of the chunk."""
        return qk[:, :, 1] * self.to_end

    @abstractmethod
    def gradient_of_whole(self, state: Tensor, adjoint: Tensor) -> Tensor:
        """The gradient of a chunk's `whole`, from the state before it and the adjoint after it, (rows, dk, dv)."""

    @abstractmethod
    def products(self, qk: Tensor) -> Tensor:
        """Products of q and k with k, decayed, (chunks, rows, 2, T, T)."""

    @abstractmethod
    def gradients(
        self,
        qk: Tensor,
        products: Tensor,
        grad_products: Tensor,
        grad_reads: Tensor,
        grad_writes: Tensor,
        grad_whole: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of qk and g; `grad_products` may be written to."""


def chunk_decays(g: Tensor) -> Decays:
    """The decay of some chunks, by the shape of its logarithm."""
    g = g.clamp(min=smallest_exponent(g.dtype))
    return _DecayOfHeads(g[..., 0]) if g.shape[-1] == 1 else _DecayOfChannels(g)


class _DecayOfHeads(Decays):
    """One number per head: the products are decayed by one T x T matrix per chunk."""

    def __init__(self, g: Tensor) -> None:
        """Take g of shape (chunks, rows, T)."""
        # Exponents are differences of sums, in which small terms get lost beside large ones: the sums are in float64.
        sums = torch.cumsum(g.to(summing_dtype(g.device)), dim=-1)

        def factors(exponents: Tensor) -> Tensor:
            return exponents.to(g.dtype).clamp(min=smallest_exponent(g.dtype)).exp_()

        differences = (sums[..., :, None] - sums[..., None, :]).tril_()  # before exp too: s > t would overflow
        self.within = factors(differences).tril_()
        self.from_start = factors(sums)[..., None]
        self.to_end = factors(sums[..., -1:] - sums)[..., None]
        self.whole = self.from_start[:, :, -1:]

    def gradient_of_whole(self, state: Tensor, adjoint: Tensor) -> Tensor:
        """The sum over the state."""
        return (state * adjoint).sum((1, 2), keepdim=True)

    def products(self, qk: Tensor) -> Tensor:
        """One T x T product per chunk, times `within`."""
        flat = qk.flatten(0, 1)
        products = torch.bmm(flat.flatten(1, 2), flat[:, 1].mT).view(*qk.shape[:4], -1)
        products *= self.within[:, :, None]
        products[:, :, 1].diagonal(dim1=-2, dim2=-1).zero_()
        return products

    def gradients(
        self,
        qk: Tensor,
        products: Tensor,
        grad_products: Tensor,
        grad_reads: Tensor,
        grad_writes: Tensor,
        grad_whole: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """By way of the gradients of the exponents of all factors.

        g_u is part of the exponents within[t, s] with s < u <= t, from_start[t] with u <= t, to_end[s] with s < u, and
        whole. The sums of `inside` are in float64, because they still form a difference.
        """
        grad_qk = grad_reads * self.from_start[:, :, None]
        from_start = torch.linalg.vecdot(grad_qk, qk).sum(2)  # (chunks, rows, T)
        of_k = grad_writes * self.to_end
        to_end = torch.linalg.vecdot(of_k, qk[:, :, 1])
        grad_qk[:, :, 1] += of_k
        grad_products[:, :, 1].diagonal(dim1=-2, dim2=-1).zero_()
        inside = (grad_products * products).sum(2).tril_(-1)
        grad_products *= self.within[:, :, None]
        flat, both = grad_qk.flatten(0, 1), qk.flatten(0, 1)
        scores = grad_products.flatten(0, 1).flatten(1, 2)  # (chunks * rows, 2 T, T)
        flat.flatten(1, 2).baddbmm_(scores, both[:, 1])
        flat[:, 1] += torch.bmm(scores.mT, both.flatten(1, 2))
        wide = summing_dtype(inside.device)
        difference = inside.sum(-1, dtype=wide) - inside.sum(-2, dtype=wide)
        later = (from_start + difference).flip(2).cumsum(2).flip(2)
        earlier = to_end.cumsum(2) - to_end
        whole = (grad_whole * self.whole)[..., 0]
        return grad_qk, (later + earlier + whole).to(qk.dtype)[..., None]


class _DecayOfChannels(Decays):
    """One number per key channel, by doubling: T is a power of two.

    Steps of neighbouring segments of m = 1, 2, 4, ... steps, of which the second begins where the first ends, are
    decayed to and from the boundary between them: their products are those of vectors multiplied by such factors. As m
    doubles, each pair s < t comes up once, and the factors grow by those of the neighbouring segment.
    """

    def __init__(self, g: Tensor) -> None:
        """Take g of shape (chunks, rows, T, dk)."""
        steps = g.shape[2]
        self.from_start, self.to_end = g.exp(), torch.ones_like(g)  # in segments of one step
        self.levels: list[tuple[int, Tensor, Tensor]] = []  # m, factors of later segments and of earlier ones
        m = 1
        while m < steps:
            start, end = _segments(self.from_start, m), _segments(self.to_end, m)
            later, earlier = start[:, :, 1].clone(), end[:, :, 0].clone()  # (chunks * rows, pairs, m, dk)
            self.levels.append((m, later, earlier))
            start[:, :, 1] *= start[:, :, 0, -1:]
            end[:, :, 0] *= later[:, :, -1:]
            m *= 2
        self.whole = self.from_start[:, :, -1, :, None]

    def gradient_of_whole(self, state: Tensor, adjoint: Tensor) -> Tensor:
        """The sum over dv."""
        return (state * adjoint).sum(-1, keepdim=True)

    def products(self, qk: Tensor) -> Tensor:
        """One product for each level; a step with itself is not decayed."""
        steps = qk.shape[3]
        products = qk.new_zeros(*qk.shape[:4], steps)
        products[:, :, 0].diagonal(dim1=-2, dim2=-1).copy_(torch.linalg.vecdot(qk[:, :, 0], qk[:, :, 1]))
        for m, later, earlier in self.levels:
            rows, columns = _vectors(qk, m, later, earlier)
            block = torch.matmul(rows.flatten(2, 3), columns.mT)  # (chunks * rows, pairs, 2 m, m)
            _pairs(products, m).copy_(block.unflatten(2, (2, m)))
        return products

    def gradients(
        self,
        qk: Tensor,
        products: Tensor,
        grad_products: Tensor,
        grad_reads: Tensor,
        grad_writes: Tensor,
        grad_whole: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """From the longest segments to the shortest.

        `of_start` and `of_end` are the gradients of the sums of g, from the start of a step's segment to it and from
        after it to the end. A longer segment's are those of its halves and the whole of the other half.
        """
        reads, writes = grad_reads * self.from_start[:, :, None], grad_writes * self.to_end
        of_start, of_end = (reads * qk).sum(2), writes * qk[:, :, 1]
        of_start[:, :, -1] += (grad_whole * self.whole)[..., 0]
        grad_qk = reads
        grad_qk[:, :, 1] += writes
        diagonal = grad_products[:, :, 0].diagonal(dim1=-2, dim2=-1)[..., None]
        grad_qk.addcmul_(qk.flip(2), diagonal[:, :, None])
        for m, later, earlier in reversed(self.levels):
            rows, columns = _vectors(qk, m, later, earlier)
            block = _pairs(grad_products, m).flatten(2, 3)  # (chunks * rows, pairs, 2 m, m), a copy
            grad_rows = torch.matmul(block, columns).view_as(rows)
            grad_columns = torch.matmul(block.mT, rows.flatten(2, 3))
            start, end = _segments(of_start, m), _segments(of_end, m)
            whole_first, whole_second = start[:, :, 1].sum(2), end[:, :, 0].sum(2)
            start[:, :, 1] += (grad_rows * rows).sum(2)
            end[:, :, 0] += grad_columns * columns
            start[:, :, 0, -1] += whole_first
            start[:, :, 1, -1] += whole_second
            vectors = grad_qk.flatten(0, 1).unflatten(2, (-1, 2, m))  # (chunks * rows, 2, pairs, 2, m, dk)
            vectors[:, :, :, 1].addcmul_(grad_rows.transpose(1, 2), later[:, None])
            vectors[:, 1, :, 0].addcmul_(grad_columns, earlier)
        return grad_qk, of_start


def _segments(tensor: Tensor, m: int) -> Tensor:
    """(chunks, rows, T, dk) -> (chunks * rows, pairs, 2, m, dk), a view: pairs of segments of m steps."""
    return tensor.flatten(0, 1).unflatten(1, (-1, 2, m))


def _vectors(qk: Tensor, m: int, later: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """Q and k of the second segments, and k of the first, decayed from and to the boundary between them.

    Returns:
        (chunks * rows, pairs, 2, m, dk) and (chunks * rows, pairs, m, dk).
    """
    vectors = qk.flatten(0, 1).unflatten(2, (-1, 2, m))  # (chunks * rows, 2, pairs, 2, m, dk)
    rows = vectors.new_empty(*later.shape[:2], 2, *later.shape[2:])
    torch.mul(vectors[:, :, :, 1].transpose(1, 2), later[:, :, None], out=rows)
    return rows, vectors[:, 1, :, 0] * earlier


def _pairs(products: Tensor, m: int) -> Tensor:
    """The blocks of products of second with first segments, (chunks * rows, pairs, 2, m, m), a view."""
    blocks = products.flatten(0, 1).unflatten(3, (-1, 2, m)).unflatten(2, (-1, 2, m))
    return blocks.diagonal(dim1=2, dim2=5)[:, :, 1, :, 0].permute(0, 4, 1, 2, 3)
