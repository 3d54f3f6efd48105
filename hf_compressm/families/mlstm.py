"""mLSTM layers (xLSTM): a matrix-valued state per head, exponential gates, and a normaliser.

| symbol | meaning | shape |
|---|---|---|
| q, k, v | query, key, value: linear in the layer's input | `(batch, length, heads, N)`, v with head_dim |
| i, f | input and forget gate, one number per head | `(batch, length, heads)` |
| C, n | state and normaliser | `(batch, heads, head_dim, N)`, `(batch, heads, N)` |
| W, V | projection of k and its right inverse, `W V = I` | `(heads, r, N)`, `(heads, N, r)` |

Discrete time, `C_t = f_t C_{t-1} + i_t v_t k_t^T`, `n_t = f_t n_{t-1} + i_t k_t`, and the read-out is
`s C_t q_t / max(s |n_t q_t|, 1)` with `s = 1 / sqrt(N)` (arXiv 2405.04517, section 2.3). The gates multiply all states
of a head alike and nothing stands between the projections and the recurrence, so a cut folds exactly into their rows:
`k~ = W k`, `q~ = sqrt(r / N) V^T q`, by balanced truncation head by head. The factor makes up for s.

The normaliser has no weight of its own in the choice of W and V: it divides a whole head, and the norm of the head
that follows takes that factor out again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compressm.families.calls import Call
from hf_compressm.families.changes import AttributeChange, MomentTerm, ParameterChange
from hf_compressm.families.family import CutMethod, LayerCut, Measurement, SSMLayer
from hf_compressm.families.layout import B, C, Layout, Slot, rows
from hf_compressm.families.maps import apply_map, float64
from hf_compressm.families.moments import CovarianceStatistics
from hf_compressm.families.projecting import in_balanced_states, projections
from hf_compressm.families.registry import register
from hf_compressm.families.selective import Selection, SelectiveFamily, parameter_name
from hf_compressm.families.sums import Statistics


SAMPLED_READS = 256
"""For how many steps of a batch, evenly spaced, it is kept what is read out."""
CACHE_MULTIPLE = 64
"""The caches of transformers round the keys of all heads up to a multiple of this, and fit only layers of one."""


class MLSTMStatistics(CovarianceStatistics):
    """The covariances, and what tells the loss of a cut after the norm of the heads.

    | name | meaning | shape |
    |---|---|---|
    | reads | q at some steps; `C^T h` with `h = C q`; `C^T s`, s random across h | `(steps, 3, heads, N)` |
    | eps | sum of the shares of eps in the square that the norm divides by | `(heads,)` |

    C and h are weighted by loudness.
    """

    def __init__(self, family: SelectiveFamily, module: Any) -> None:
        super().__init__(family, module)
        self.eps = float(module.multihead_norm.eps)
        self._reads: list[Tensor] = []  # those of the present call, on the layer's device

    def sums_of(self, call: Call, mask: Tensor | None) -> dict[str, Tensor]:
        """Those of one call."""
        variance = call.output.detach().float().var(dim=-1, correction=0).movedim(1, 0)  # (heads, batch, length)
        share = self.eps / (variance + self.eps)
        real = share if mask is None else share * mask
        sums = {**super().sums_of(call, mask), "eps": real.flatten(1).sum(dim=1)}
        reads, self._reads = torch.cat(self._reads), []
        self.keep_rows("reads", reads)
        return sums

    def sample(self, weighted: Tensor, reads: Tensor, first: int, count: int) -> None:
        """Keep the steps of a chunk that are due, of `count` in all."""
        _, batch, _, channels, _ = weighted.shape
        every = min(max(1, count * batch // SAMPLED_READS), count)
        due = slice(-(first + 1) % every, None, every)
        C, q = weighted[due], reads[due]
        if not len(C):
            return
        h = torch.einsum("sbhdn,sbhn->sbhd", C, q)
        signs = _signs(C.shape[:2].numel() * channels, first, C.device).to(C).view(*C.shape[:2], 1, channels)
        square = h.square().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
        across = signs - h * (h * signs).sum(dim=-1, keepdim=True) / square
        along, beside = (torch.einsum("sbhdn,sbhd->sbhn", C, mixture) for mixture in (h, across))
        self._reads.append(torch.stack([q, along, beside], dim=2).flatten(0, 1))


@dataclass(frozen=True)
class MLSTMFamily(SelectiveFamily):
    """Family of `xLSTMLayer` of transformers, and of the `mLSTMLayer` that it takes from xlstm where that is there."""

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """An empty accumulator."""
        return MLSTMStatistics(self, module)

    def state_entries(self, module: Any) -> int:
        """Keys by values of every head, and the normaliser."""
        return (int(module.v_dim) + _heads(module)) * self.state_size(module)

    def granularity(self, module: Any) -> int:
        """What keeps the keys of all heads a multiple of what caches need, if they are one now."""
        if int(module.qk_dim) % CACHE_MULTIPLE:
            return 1
        return CACHE_MULTIPLE // math.gcd(CACHE_MULTIPLE, _heads(module))

    def cached_sizes(self, module: Any, given: Sequence[Any]) -> Iterator[int]:
        """The keys of the state, which is passed to the layer as a tuple."""
        yield from (state[0].shape[2] for state in given if isinstance(state, tuple) and isinstance(state[0], Tensor))

    def configured(self, module: Any, size: int) -> Mapping[str, int | float]:
        """The width of all heads as a share of the hidden size."""
        width, keys = _hidden(module), _heads(module) * size
        factor = keys / width
        factor = factor if int(width * factor) == keys else math.nextafter(factor, math.inf)
        return {self.size_field: factor}

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the error of keeping the first k balanced states."""
        measured = super().measure(layer, method, statistics)
        if measured.problem or statistics is None:
            return measured
        reads = measured.detail.samples["reads"]
        balanced = in_balanced_states(measured, statistics.mean("P"), statistics.mean("Q"), layer, method)
        return replace(balanced, errors=_errors(balanced.detail, reads, statistics.mean("eps")))

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Project keys and queries of every head onto `size` balanced states."""
        W, V = projections(measurement.detail, size)
        spectrum, selected = measurement.hankel_singular_values, self.first(layer.module, size)
        return LayerCut(
            changes=tuple(self._change(layer, slot, W, V) for slot in self.layout.slots(layer.module)),
            attributes=self.attributes(layer.module, size, selected),
            predicted_error=float(measurement.errors[size]),
            error_bound=None,
            energy_kept=float(spectrum[:size].sum() / spectrum.sum()),
        )

    def _change(self, layer: SSMLayer, slot: Slot, W: Tensor, V: Tensor) -> ParameterChange:
        """The rows that make k, q or both; with `k = V k~` and `q = W^T q~ / c`, gradients map by the adjoints."""
        c = (W.shape[1] / W.shape[2]) ** 0.5
        forward = self._along(slot, {B: W, C: c * V.mT})
        adjoint = self._along(slot, {B: V.mT, C: W / c})
        parameter: Any = slot.tensor
        return ParameterChange(
            parameter_name(layer, slot.name),
            parameter,
            apply_map(float64(parameter), forward, slot.axis),
            (MomentTerm(parameter, adjoint, slot.axis),),
            row_map=forward,
        )

    def _along(self, slot: Slot, maps: Mapping[str, Tensor]) -> Tensor:
        """The map along all rows of a projection, `(new, old)`."""
        blocks = [block for one in slot.part.segments if one in (B, C) for block in maps[str(one)]]
        rest = slot.tensor.shape[slot.axis] - sum(block.shape[1] for block in blocks)
        return torch.block_diag(*blocks, torch.eye(rest, dtype=torch.float64))


class HeadLayout(Layout):
    """A layout whose layers name the width of all heads together."""

    def size_of(self, module: Any) -> int:
        """N."""
        return super().size_of(module) // _heads(module)

    def attributes(self, module: Any, size: int, kept: Tensor) -> tuple[AttributeChange, ...]:
        """The widths of the projections, and that of all heads."""
        found = super().attributes(module, size, kept)
        of_heads = AttributeChange(module, self.state_size, _heads(module) * size)
        return (of_heads, *(one for one in found if one.name != self.state_size))


def _heads(module: Any) -> int:
    return int(module.config.num_heads)


def _hidden(module: Any) -> int:
    """Width of the layer's input; xlstm's configurations call it `embedding_dim`."""
    return int(getattr(module.config, "hidden_size", None) or module.config.embedding_dim)


def _signs(count: int, seed: int, device: torch.device) -> Tensor:
    """Signs that look random, the same ones in every run, `(count,)`, made on the device.

    The last bit of a hash of their number, by multiplying and shifting (splitmix32).
    """
    number = torch.arange(count, device=device) + (seed * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        number = (number ^ (number >> shift)) * factor & 0xFFFFFFFF
    return 1 - 2 * ((number ^ (number >> 15)) & 1)


def _errors(selection: Selection, reads: Tensor, eps: Tensor) -> Tensor:
    """Relative error of the output after keeping the first k balanced states of the order, `(N + 1,)`.

    A read-out of length `|h|` becomes h', and the norm divides both by the root of their square plus eps. So the error
    is `|a h' - h|` with `1 / a^2 = (1 - eps) |h'|^2 / |h|^2 + eps` for a share `eps`: less than what is missing of h,
    where that points along h. What lies beside h is known from a random mixture, whose square is right on average.
    Other than in the tails of `sigma^2`, states and their read-outs may depend on each other.

    Args:
        selection: what is kept first.
        reads: as `MLSTMStatistics` has them.
        eps: `(heads,)`, mean share of eps.
    """
    W, V = projections(selection, selection.orders.shape[1])
    q, along, beside = reads.unbind(1)
    read = torch.einsum("shn,hnr->shr", q, V)

    def kept(states: Tensor) -> Tensor:
        parts = (read * torch.einsum("shn,hrn->shr", states, W)).gather(2, selection.orders.expand_as(read))
        return F.pad(parts.cumsum(dim=-1), (1, 0))  # (steps, heads, N + 1)

    tiny = torch.finfo(q.dtype).tiny
    h = (q * along).sum(dim=-1, keepdim=True).clamp_min(tiny)  # |h|^2
    part, rest = kept(along) / h, kept(beside).square() / h  # h' along h, and beside it, as shares of h
    a = ((1 - eps[:, None]) * (part.square() + rest) + eps[:, None]).clamp_min(tiny).rsqrt()
    square = h * ((a * part - 1).square() + a.square() * rest)
    errors = (square.sum(dim=(0, 1)) / h.sum()).sqrt().clamp_max(1.0)
    errors[0], errors[-1] = 1.0, 0.0
    return errors.flip(0).cummax(dim=0).values.flip(0)  # noise may make a smaller size look better


_OTHERS = (
    *(f"{name}.{own}" for name in ("v", "ogate_preact", "igate_preact", "fgate_preact") for own in ("weight", "bias")),
    *(f"{name}.{own}" for name in ("ifgate_preact", "multihead_norm", "out_proj") for own in ("weight", "bias")),
)
_SINGLE = HeadLayout("qk_dim", (rows("q", "C", folds=True), rows("k", "B", folds=True)), groups=_heads, others=_OTHERS)
_FUSED = replace(_SINGLE, parts=(rows("qkv_opreact", "C", "B", "*", folds=True),))
for _type in ("transformers.models.xlstm.modeling_xlstm.xLSTMLayer", "xlstm.xlstm_large.model.mLSTMLayer"):
    for _layout, _mark in ((_SINGLE, ""), (_FUSED, "qkv_opreact")):
        register(
            MLSTMFamily(
                name="xlstm",
                module_type=_type,
                size_field="qk_dim_factor",
                per_layer=False,
                criteria=("empirical", "fisher"),
                size_type=float,
                layout=_layout,
                mark=_mark,
            )
        )
