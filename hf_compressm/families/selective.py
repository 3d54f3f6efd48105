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

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from hf_compressm.families.family import (
    AttributeChange,
    CutMethod,
    Family,
    LayerCut,
    LayerShape,
    Measurement,
    ParameterChange,
    SSMLayer,
    Statistics,
    has_finite_parameters,
    kept_order,
)
from hf_compressm.families.sampling import sampled_rows
from hf_compressm.numerics import interpolation


@dataclass(frozen=True, eq=False)
class Signals:
    """What a layer's scan computes in one forward call, in float32 at least."""

    states: Iterator[Tensor]  # chunks in time, (steps, batch, groups, channels, N), which may be overwritten
    every: int  # the states are those after every so many steps
    gain: Tensor  # (length, batch, groups, channels), 0 at padding
    B: Tensor  # (batch, length, groups, N)
    C: Tensor  # (batch, length, groups, N)
    mask: Tensor  # (batch, length), 1 for real tokens and 0 for padding


@dataclass(frozen=True, eq=False)
class Selection:
    """The part of a measurement that `cut` needs."""

    orders: Tensor  # (groups, N), most wanted first
    P: Tensor  # (groups, N, N); M if states are dropped without repair
    Q: Tensor  # (groups, N, N); ones in that case
    reads_out: bool  # whether the dropped states are read out of the kept ones
    samples: Mapping[str, Tensor] = field(default_factory=dict)  # B and C, (tokens, groups, N)


class CovarianceStatistics(Statistics):
    """Loudness-weighted state covariance P and read-out covariance Q of every group."""

    def __init__(self, family: "SelectiveFamily") -> None:
        """Start with nothing seen, for layers of this family."""
        super().__init__()
        self.family = family

    def update(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add up P, Q and, where a read-out cannot be folded in, M."""
        self.told_apart = kwargs.get("seq_idx") is not None
        for text in self.family.texts(args, kwargs):
            hidden_states, mask = sampled_rows(*text, self.family.state_size(module))
            self._add_up(self.family.signals(module, hidden_states, mask))

    def _add_up(self, signals: Signals) -> None:
        tokens, every = signals.mask.sum(), signals.every
        self.add("tokens", tokens)
        gains, reads = signals.gain[every - 1 :: every], signals.C[:, every - 1 :: every].transpose(0, 1)
        share = tokens / signals.mask[:, every - 1 :: every].sum().clamp_min(1)
        with maybe_autocast(device_type=signals.B.device.type, enabled=False):
            start = 0
            for states in signals.states:
                weighted = states.mul_(gains[start : start + states.shape[0], ..., None])
                self.add("P", share * _second_moment(weighted.movedim(2, 0)))
                if not self.family.reads_out:
                    read = reads[start : start + states.shape[0]].unsqueeze(3)
                    self.add("M", share * _second_moment((weighted * read).movedim(2, 0)))
                start += states.shape[0]
            self.add("Q", _second_moment((signals.C * signals.mask[..., None, None]).movedim(2, 0)))
        if self.family.sampled_tokens:
            for name, signal in (("B", signals.B), ("C", signals.C)):
                rows = signal.detach()[signals.mask > 0]
                every = max(1, rows.shape[0] // self.family.sampled_tokens)
                self.samples.setdefault(name, []).append(rows[::every].to("cpu", torch.float64))


def _second_moment(signal: Tensor) -> Tensor:
    """Sum of outer products of `(groups, ..., rows, N)` over all but the groups, `(groups, N, N)`.

    One product per entry of the middle axes: a single product would first copy the states, which are transposed.
    """
    return (signal.mT @ signal).flatten(1, -3).sum(dim=1)


@dataclass(frozen=True)
class SelectiveFamily(Family):
    """One layout of selective layers.

    Attributes:
        state_size_name: the layer's attribute with the state size.
        input_name: the first argument of the layer's forward.
        reads_out: whether a linear map of the read-out can be folded into the layer's parameters.
        sampled_tokens: for how many tokens of a batch, evenly spaced, `statistics` keeps B and C.
    """

    state_size_name: str = "ssm_state_size"
    input_name: str = "hidden_states"
    reads_out: bool = True
    sampled_tokens: int = 0

    def texts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The inputs of one call, `(batch, length, hidden)`, with their masks; packed texts one by one."""
        hidden_states = args[0] if args else kwargs[self.input_name]
        mask, seq_idx = kwargs.get("attention_mask"), kwargs.get("seq_idx")
        if seq_idx is None or "seq_idx" not in self.tells_texts_apart_by:
            yield hidden_states, mask
            return
        begins = torch.ones_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        bounds = [*begins.flatten().nonzero().flatten().tolist(), seq_idx.numel()]
        tokens = hidden_states.flatten(0, 1)
        for start, end in pairwise(bounds):
            yield tokens[None, start:end], None if mask is None else mask.flatten()[None, start:end]

    @abstractmethod
    def signals(self, module: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
        """The signals of the layer's scan for `(batch, length, hidden)`, with padding set to zero as in the layer."""

    @abstractmethod
    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """The parameters of a layer that keeps `kept` `(groups, r)` and reads out `R^T C`, R `(groups, N, r)`."""

    @abstractmethod
    def attributes(self, module: Any, size: int, kept: Tensor) -> list[tuple[nn.Module, str, Any]]:
        """Attributes and buffers, besides the state size, that follow a cut to `size` states."""

    @abstractmethod
    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes with `size` states, by name, of the parameters whose shape depends on it."""

    def at_size(self, module: Any, size: int) -> LayerShape:
        """What a layer would look like; buffers that a larger state needs repeat the present entries."""
        present = self.state_size(module)
        groups = int(getattr(module, "n_groups", None) or getattr(module, "ngroups", None) or 1)
        kept = (torch.arange(size) % present).expand(groups, size)
        attributes = [(module, self.state_size_name, size), *self.attributes(module, size, kept)]
        return LayerShape(self.shapes(module, size), tuple(AttributeChange(*attribute) for attribute in attributes))

    def mismatch(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> float:
        """Relative mean square error of a cut layer's output, besides that of dropping and reading out states."""
        return 0.0

    def state_size(self, module: Any) -> int:
        """Number of states per channel."""
        return int(getattr(module, self.state_size_name))

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """An empty accumulator; all criteria need data."""
        return CovarianceStatistics(self)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the order in which states are kept."""
        problem = self.problem(layer, statistics)
        if problem or statistics is None:
            return unmeasurable(layer, problem)
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
        orders = torch.stack([order[kept_order(order.numel(), method, layer)] for order, _ in ranked])
        errors = interpolation.relative_errors(losses.sum(dim=0))
        samples = {name: torch.cat(parts) for name, parts in statistics.samples.items()}
        scores = P.diagonal(dim1=1, dim2=2) * Q.diagonal(dim1=1, dim2=2)
        return Measurement(sigma, errors, detail=Selection(orders, P, Q, self.reads_out, samples), scores=scores)

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
        kept = selection.orders[:, :size].sort(dim=-1).values
        R = _read_out(selection, kept)
        error = selection_error(selection.P, selection.Q, kept, R)
        mismatch = self.mismatch(layer, kept, R, selection)
        sigma = measurement.hankel_singular_values
        attributes = [(layer.module, self.state_size_name, size), *self.attributes(layer.module, size, kept)]
        return LayerCut(
            changes=self.changes(layer, kept, R, selection),
            attributes=tuple(AttributeChange(*attribute) for attribute in attributes),
            predicted_error=min(1.0, (error**2 + mismatch) ** 0.5),
            error_bound=None,
            energy_kept=float(sigma[:size].sum() / sigma.sum()),
        )


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


def float64(parameter: Tensor) -> Tensor:
    """The parameter in float64 on the CPU, without gradients."""
    return parameter.detach().to("cpu", torch.float64)


def parameter_name(layer: SSMLayer, name: str) -> str:
    """Dotted name of a layer's parameter in the model."""
    return f"{layer.name}.{name}" if layer.name else name
