"""Mamba-3 layers of mamba-ssm with one input per head (SISO): states in pairs, of which the first ones turn.

| symbol | meaning | shape |
|---|---|---|
| k, q | B and C after norm, bias and rotation; every head has its own | `(batch, length, heads, N)` |
| M | `E[g^2 (q h) (q h)^T]`, entry by entry, summed over the heads | `(N, N)` |

B and C are normalised over the states, by one norm for all groups, and turned by angles that all heads share, so a
layer has one selection. States 2i and 2i + 1 stay or go together, and as many of the turning pairs stay as a layer of
the smaller size has: `rotary_dim_divisor` states at a time. What the norms divide by changes with every cut. The
least-squares estimate of that factor goes into their weights; the rest is a part of the predicted error.

Layers with several inputs per head (MIMO) are left alone, and say so.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.calls import Call
from hf_compressm.families.changes import ParameterChange, with_values
from hf_compressm.families.family import CutMethod, Measurement, SSMLayer, kept_order
from hf_compressm.families.layout import Following, Layout, Part, rows
from hf_compressm.families.maps import float64
from hf_compressm.families.moments import CovarianceStatistics
from hf_compressm.families.registry import register
from hf_compressm.families.selective import Selection, SelectiveFamily
from hf_compressm.families.sums import Statistics
from hf_compressm.numerics import interpolation


SAMPLED_VECTORS = 1024
"""For how many steps of a batch, evenly spaced, B and C are kept as they leave their norms."""


class Mamba3Statistics(CovarianceStatistics):
    """The sums, and samples of B and C before bias and rotation."""

    def sums_of(self, call: Call, mask: Tensor | None) -> dict[str, Tensor]:
        """Those of all heads, each a group of its own."""
        for name in ("B", "C"):
            vectors = call.arguments[name].detach().flatten(0, -2)
            step = max(1, vectors.shape[0] // SAMPLED_VECTORS)
            self.keep_rows(name, vectors[::step])
        return super().sums_of(call, mask)


@dataclass(frozen=True)
class Mamba3Family(SelectiveFamily):
    """Family of `mamba_ssm.Mamba3`."""

    @property
    def normalizes(self) -> bool:
        """B and C."""
        return True

    def granularity(self, module: Any) -> int:
        """A pair of states, and where only a part of them turn, pairs of both kinds."""
        return int(module.rotary_dim_divisor)

    def first(self, module: Any, size: int) -> Tensor:
        """The first pairs of both kinds."""
        turning, pairs = turning_pairs(module, size), torch.arange(self.state_size(module) // 2)
        still = pairs[module.num_rope_angles :][: size // 2 - turning]
        return _states(torch.cat([pairs[:turning], still]))[None]

    def exchanged(self, module: Any) -> Tensor:
        """Pairs of each kind exchanged among themselves."""
        pairs = torch.arange(self.state_size(module) // 2)
        kinds = pairs.tensor_split([int(module.num_rope_angles)])
        return _states(torch.cat([kind.roll(1) for kind in kinds]))[None]

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """An empty accumulator."""
        return Mamba3Statistics(self, module)

    def problem(self, layer: SSMLayer, statistics: Statistics | None) -> str:
        """Why a layer cannot be measured, or ""."""
        if layer.module.is_mimo:
            return "it has several inputs per head (MIMO), and only layers with one (SISO) are measured"
        return super().problem(layer, statistics)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the order in which pairs of states are kept."""
        measured = super().measure(layer, method, statistics)
        if measured.problem or statistics is None:
            return measured
        M, step = statistics.mean("M")[0], self.granularity(layer.module)
        pairs, errors = _pair_order(M, int(layer.module.num_rope_angles), step // 2)
        blocks = pairs[: len(pairs) // (step // 2) * (step // 2)].view(-1, step // 2)
        rest = pairs[blocks.numel() :]  # a number of states that is no multiple has a pair more, which goes first
        wanted = blocks[kept_order(len(blocks), method, layer)].flatten()
        by_state = errors[torch.arange(layer.state_size + 1) // step * (step // 2)]
        by_state[-1] = 0.0
        selection: Selection = measured.detail
        orders = _states(torch.cat([wanted, rest]))[None]
        return replace(measured, errors=by_state, detail=replace(selection, orders=orders))

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """The states that stay, and in the norms' weights the factor by which they divide differently."""
        changes, module = super().changes(layer, kept, R, selection), layer.module
        scales = {id(_norm(module, name).weight): _norm_fit(module, name, kept[0], selection)[0] for name in "BC"}
        return with_values(changes, scales)

    def mismatch(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> float:
        """What the factors leave of the norms' changes, weighted by each state's share in the output."""
        energy = selection.P[0].diagonal()[kept[0]]
        residual = sum(_norm_fit(layer.module, name, kept[0], selection)[1] for name in "BC")
        return float((residual * energy).sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny))

    @property
    def selects_rows(self) -> bool:
        """Not of the norms' weights, which are scaled."""
        return False


def turning_pairs(module: Any, size: int) -> int:
    """How many pairs turn in a layer of `size` states."""
    return 2 * size // int(module.rotary_dim_divisor) // 2


def turning_states(module: Any, size: int) -> int:
    """How many states turn in a layer of `size` states."""
    return 2 * turning_pairs(module, size)


def _states(pairs: Tensor) -> Tensor:
    """The states of pairs, in their order."""
    return torch.stack([2 * pairs, 2 * pairs + 1], dim=-1).flatten()


def _kept_angles(module: Any, kept: Tensor) -> Tensor:
    """The pairs that turn among states that are kept."""
    return kept[(kept % 2 == 0) & (kept < 2 * module.num_rope_angles)] // 2


def _pair_order(M: Tensor, turning: int, in_block: int) -> tuple[Tensor, Tensor]:
    """The order in which pairs are kept, most wanted first, and the error after keeping the first k of them.

    Args:
        M: `(N, N)`.
        turning: how many pairs turn, the first ones.
        in_block: of so many pairs that go together, one turns.
    """
    of_pairs = M.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum(dim=(1, 3))
    count = len(of_pairs)
    is_turning = torch.arange(count) < turning
    block = [True] + [False] * (in_block - 1)
    sequence = [False] * (count - turning * in_block) + block * turning  # kinds, from the first to go to the last
    candidates = torch.stack([is_turning == kind for kind in sequence])
    return interpolation.elimination_order(of_pairs, candidates)


def _norm(module: Any, name: str) -> Any:
    return module.B_norm if name == "B" else module.C_norm


def _norm_fit(module: Any, name: str, kept: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """The weight of a norm of the kept states, `(r,)`, and the share of each state's mean square that it misses."""
    weight, full = float64(_norm(module, name).weight), selection.samples[name]  # (vectors, N)
    tiny = torch.finfo(full.dtype).tiny
    known = weight != 0  # what a weight of zero hides is taken to be as large as the rest
    direction = torch.where(known, full / torch.where(known, weight, 1), 0)
    # A norm divides by the root of mean square plus eps; the share of eps is what a normalised mean square lacks.
    eps = (1 - direction.square().mean(-1, keepdim=True)).clamp_min(0) if bool(known.all()) else 0.0
    wanted, entries = full[:, kept], direction[:, kept]
    square = entries.square().sum(-1, keepdim=True) / known[kept].sum().clamp_min(1)
    got = entries / (square + eps).clamp_min(tiny).sqrt()
    scale = (got * wanted).sum(0) / got.square().sum(0).clamp_min(tiny)
    bias = float64(module.B_bias if name == "B" else module.C_bias)[..., kept].square().mean(dim=(0, 1))
    whole = wanted.square().mean(0) + bias
    return scale, (got * scale - wanted).square().mean(0) / whole.clamp_min(tiny)


def _before(module: Any) -> int:
    """Rows of `in_proj` that make gate and input."""
    return 2 * int(module.d_inner)


def _between(module: Any) -> int:
    """Those that make step, decay and trapezoid."""
    return 3 * int(module.nheads)


def _copies(module: Any) -> int:
    """How often B lies in `in_proj`."""
    return int(module.num_bc_heads) * int(module.mimo_rank)


_ANGLES = Following(turning_pairs, _kept_angles)
register(
    Mamba3Family(
        name="mamba3",
        module_type="mamba_ssm.modules.mamba3.Mamba3",
        size_field="d_state",
        per_layer=False,
        criteria=("empirical", "fisher"),
        layout=Layout(
            state_size="d_state",
            parts=(
                Part("in_proj", 0, (_before, "B", "C", _between, _ANGLES), copies=_copies),
                Part("B_bias", -1, ("B",)),
                Part("C_bias", -1, ("C",)),
                rows("B_norm", "B"),
                rows("C_norm", "C"),
            ),
            follows={"split_tensor_size": turning_states, "num_rope_angles": turning_pairs},
            others=("dt_bias", "D", "norm.weight", "out_proj.weight", "mimo_x", "mimo_z", "mimo_o"),
        ),
    )
)
