"""What all selective layers (the Mamba families) share: states are measured on data, and selected or projected.

| symbol | meaning | shape |
|---|---|---|
| h | states; the channels of a group share B and C | `(batch, groups, channels, N)` |
| B, C | input and read-out | `(batch, length, groups, N)` |
| g | loudness: gain from a channel's scan output to the layer's output | `(length, batch, groups, channels)` |
| P | `E[g^2 h h^T]` over tokens and channels | `(groups, N, N)` |
| Q | `E[C_t C_t^T]` | `(groups, N, N)` |
| M | `E[g^2 (C_t h) (C_t h)^T]`, entry by entry: the cost of states dropped without repair | `(groups, N, N)` |

A layer has one state size, but every group keeps states of its own. The layer's spectrum is the sum over the groups of
their k-th values, so that its first r entries are the energy that r states per group keep.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_compressm.families.changes import AttributeChange, ParameterChange
from hf_compressm.families.family import (
    CutMethod,
    Family,
    LayerCut,
    LayerShape,
    Measurement,
    SSMLayer,
    has_finite_parameters,
    kept_order,
)
from hf_compressm.families.layout import STATE, Layout
from hf_compressm.families.moments import CovarianceStatistics, SurrogateStatistics
from hf_compressm.families.sums import Statistics
from hf_compressm.numerics import interpolation, surrogate
from hf_compressm.peft import plain_modules


@dataclass(frozen=True, eq=False)
class Selection:
    """The part of a measurement that `cut` needs."""

    orders: Tensor  # (groups, N), most wanted first
    P: Tensor  # (groups, N, N); M if states are dropped without repair
    Q: Tensor  # (groups, N, N); ones in that case
    reads_out: bool  # whether the dropped states are read out of the kept ones
    samples: Mapping[str, Tensor] = field(default_factory=dict)  # B and C, (tokens, groups, N)
    for_fit: Tensor | None = None  # orders for a cut that is fitted afterwards, if these are others


@dataclass(frozen=True)
class SelectiveFamily(Family):
    """Layers of one layout, whose states are selected.

    Attributes:
        layout: which axes of which parameters hold states.
        sampled_tokens: for how many tokens of a batch, evenly spaced, `statistics` keeps B and C.
    """

    layout: Layout = field(default=Layout("", ()), compare=False)
    sampled_tokens: int = 0

    @property
    def mask(self) -> str:
        """That of the layout."""
        return self.layout.mask

    @property
    def cache_axis(self) -> int:
        """The axis of the states in a cached state of transformers."""
        return -1

    @property
    def unfused(self) -> Mapping[str, Any]:
        """Those of the layout."""
        return self.layout.unfused

    @property
    def reads_out(self) -> bool:
        """Whether a linear map of the read-out can be folded into the layer's parameters."""
        return self.layout.folds

    @property
    def normalizes(self) -> bool:
        """Whether norms over the states lie before the recurrence, and `changes` makes up for what they divide by."""
        return False

    def output_of(self, module: Any) -> nn.Module | None:
        """The output projection."""
        owner = module
        for name in self.layout.output.split("."):
            owner = getattr(owner, name, None)
        return owner if isinstance(owner, nn.Module) else None

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """The parameters of a layer that keeps `kept` `(groups, r)` and reads out `R^T C`, R `(groups, N, r)`."""
        return self.layout.changes(layer.module, f"{layer.name}." if layer.name else "", kept, R)

    def attributes(self, module: Any, size: int, kept: Tensor) -> tuple[AttributeChange, ...]:
        """Attributes and buffers that follow a cut to `size` states."""
        return self.layout.attributes(module, size, kept)

    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes with `size` states, by name, of the parameters whose shape depends on it."""
        return self.layout.shapes(module, size)

    def at_size(self, module: Any, size: int) -> LayerShape:
        """What a layer would look like; buffers that a larger state needs repeat the present entries."""
        kept = (torch.arange(size) % self.state_size(module)).expand(self.layout.groups_of(module), size)
        return LayerShape(self.shapes(module, size), self.attributes(module, size, kept))

    def first(self, module: Any, size: int) -> Tensor:
        """States that a layer could keep, `(groups, size)`, ascending: the first ones."""
        return torch.arange(size).expand(self.layout.groups_of(module), size)

    def fitted(self, module: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """All that makes B, C and decay of the states."""
        return self.layout.fitted(module)

    def exchanged(self, module: Any) -> Tensor:
        """An order of all states in which the layer is the same, `(groups, N)`."""
        states = torch.arange(self.state_size(module))
        return torch.stack([states.roll(1 + group) for group in range(self.layout.groups_of(module))])

    def state_entries(self, module: Any) -> int:
        """One number for each channel and state."""
        slots = [slot for slot in self.layout.slots(module) if slot.tensor.dim() > 1]
        held = [slot.tensor.numel() for slot in slots if slot.part.segments == (STATE,)]
        output: Any = self.output_of(module)
        return sum(held) if held else self.state_size(module) * int(output.weight.shape[1])

    def cached_sizes(self, module: Any, given: Sequence[Any]) -> Iterator[int]:
        """What the layer's recurrent states hold in a cache of transformers."""
        cache: Any = next((value for value in given if isinstance(value, Cache)), None)
        index = getattr(module, "layer_idx", None)
        if cache is None or index is None:
            return
        layers, linear = cache.layers[index : index + 1], getattr(cache, "linear_cache", [])  # of MiniMax
        held = [state for layer in layers for state in getattr(layer, "recurrent_states", {}).values()]
        every = (*held, *linear[index : index + 1])
        yield from (state.shape[self.cache_axis] for state in every if isinstance(state, Tensor))

    def state_axes(self, module: Any) -> Mapping[str, int | None]:
        """Those of the layout."""
        return self.layout.state_axes(module)

    def state_widths(self, module: Any) -> set[int]:
        """The states of one group, and of all groups side by side."""
        return {self.state_size(module), self.layout.groups_of(module) * self.state_size(module)}

    @property
    def selects_rows(self) -> bool:
        """Whether nothing is folded into the projections."""
        return not self.reads_out

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """The projections and convolutions that make B and C."""
        modules = dict(plain_modules(layer.module))
        return tuple(part.name for part in self.layout.parts if part.name in modules)

    def mismatch(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> float:
        """Relative mean square error of a cut layer's output, besides that of dropping and reading out states."""
        return 0.0

    def state_size(self, module: Any) -> int:
        """Number of states per channel."""
        return self.layout.size_of(module)

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """An empty accumulator; all criteria need data."""
        kind = SurrogateStatistics if criterion == "surrogate" else CovarianceStatistics
        return kind(self, module)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, or those of the averaged systems, and the order in which states are kept."""
        problem = self.problem(layer, statistics)
        if problem or statistics is None:
            return unmeasurable(layer, problem)
        if method.criterion == "surrogate":
            return _surrogate(layer, method, statistics)
        P, Q = statistics.mean("P"), statistics.mean("Q")
        sigma = interpolation.empirical_hankel_singular_values(P, Q).sum(dim=0)
        if not float(sigma[0]) > 0:
            return unmeasurable(layer, "no output energy")
        if self.reads_out:
            ranked = [interpolation.pivoted_selection(*pair) for pair in zip(P, Q, strict=True)]
        else:
            P = statistics.mean("M")
            Q = torch.ones_like(P)  # `tr(Q P)` over the dropped states is what they cost together
            ranked = [interpolation.elimination_order(M) for M in P]
        energies = torch.einsum("gij,gji->g", P, Q)
        losses = torch.stack([errors.square() for _, errors in ranked]) * energies[:, None]
        ways = kept_order(ranked[0][0].numel(), method, layer)
        orders = torch.stack([order[ways] for order, _ in ranked])
        errors = interpolation.relative_errors(losses.sum(dim=0))
        samples = {name: torch.cat(parts).double() for name, parts in statistics.samples.items()}
        scores = P.diagonal(dim1=1, dim2=2) * Q.diagonal(dim1=1, dim2=2)
        for_fit = None
        if self.fits_other_states and method.refit_steps:
            pairs = zip(statistics.mean("P"), statistics.mean("Q"), strict=True)
            for_fit = torch.stack([interpolation.pivoted_selection(*pair)[0][ways] for pair in pairs])
        selection = Selection(orders, P, Q, self.reads_out, samples, for_fit)
        energy = float(energies.sum()) / 2 if method.criterion == "fisher" else 1.0
        examples = tuple(statistics.examples)
        return Measurement(sigma, errors, detail=selection, scores=scores, examples=examples, energy=energy)

    def problem(self, layer: SSMLayer, statistics: Statistics | None) -> str:
        """Why a layer cannot be measured, or ""."""
        if statistics is None:
            raise ValueError(f"{layer.name}: {self.name} layers are measured on calibration data.")
        if statistics.problem:
            return statistics.problem
        if not has_finite_parameters(layer.module):
            return "non-finite parameters"
        finite = all(bool(torch.isfinite(total).all()) for total in statistics.sums.values())
        return "" if finite else "non-finite states"

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Keep `size` states of every group, and read the dropped ones out of them if that can be folded."""
        selection: Selection = measurement.detail
        orders = selection.orders if selection.for_fit is None or not method.refit_steps else selection.for_fit
        kept = orders[:, :size].sort(dim=-1).values
        R = _read_out(selection, kept)
        error = selection_error(selection.P, selection.Q, kept, R)
        mismatch = self.mismatch(layer, kept, R, selection)
        sigma = measurement.hankel_singular_values
        return LayerCut(
            changes=self.changes(layer, kept, R, selection),
            attributes=self.attributes(layer.module, size, kept),
            predicted_error=min(1.0, (error**2 + mismatch) ** 0.5),
            error_bound=None,
            energy_kept=float(sigma[:size].sum() / sigma.sum()),
        )


def _surrogate(layer: SSMLayer, method: CutMethod, statistics: Statistics) -> Measurement:
    """The spectrum of the averaged systems, and the order of their states."""
    averages = [statistics.mean(name) for name in ("a", "b", "c")]
    gramians = [surrogate.surrogate_gramians(*group) for group in zip(*averages, strict=True)]
    sigma = torch.stack([surrogate.surrogate_hankel_singular_values(P, Q) for P, Q in gramians]).sum(dim=0)
    if not float(sigma[0]) > 0:
        return unmeasurable(layer, "no output energy")
    scores = torch.stack([surrogate.surrogate_scores(P, Q) for P, Q in gramians])
    orders = [group.argsort(descending=True, stable=True) for group in scores]
    orders = [order[kept_order(order.numel(), method, layer)] for order in orders]
    losses = [surrogate.surrogate_losses(*pair, order) for pair, order in zip(gramians, orders, strict=True)]
    errors = interpolation.relative_errors(torch.stack(losses).sum(dim=0))
    shared = torch.stack([(P * Q).sum(dim=0) for P, Q in gramians])  # the loss that two states share
    selection = Selection(torch.stack(orders), shared, torch.ones_like(shared), reads_out=False)
    return Measurement(sigma, errors, detail=selection, scores=scores)


def _read_out(selection: Selection, kept: Tensor) -> Tensor:
    """R `(groups, N, r)`, which reads all states out of the kept ones; without repair, only the kept ones."""
    if selection.reads_out:
        pairs = zip(selection.P, kept, strict=True)
        return torch.stack([interpolation.interpolation_matrix(P, indices) for P, indices in pairs])
    return torch.eye(selection.orders.shape[1], dtype=torch.float64)[kept].mT


def selection_error(P: Tensor, Q: Tensor, kept: Tensor, R: Tensor) -> float:
    """Predicted relative output error of all groups together."""
    energies = torch.einsum("gij,gji->g", P, Q)
    errors = [interpolation.selection_error(*group) for group in zip(P, Q, kept, R, strict=True)]
    lost = energies * torch.tensor(errors, dtype=torch.float64).square()
    return float((lost.sum() / energies.sum()).sqrt())


def unmeasurable(layer: SSMLayer, problem: str) -> Measurement:
    """A measurement that keeps everything and says why."""
    size = layer.state_size
    return Measurement(torch.full((size,), torch.nan, dtype=torch.float64), torch.zeros(size + 1), problem)


def parameter_name(layer: SSMLayer, name: str) -> str:
    """Dotted name of a layer's parameter in the model."""
    return f"{layer.name}.{name}" if layer.name else name
