"""What S5 and LRU layers share: linear time-invariant systems, cut by balanced truncation.

| symbol | meaning | shape |
|---|---|---|
| slots | stored complex states; `state_size` counts two per slot where conjugates are implied | |
| system | the discrete-time system that the layer computes, `y_k = Re(C h_k)` | |
| participation | share of old state k in new state i, rows sum to one | `(r, slots)` |

Discrete time. The participation factors (Perez-Arriaga et al., IEEE TPAS 101, 1982) are the diagonal of the gradient
map of the eigenvalues, and carry over every parameter that is one number per state.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from hf_compressm.families.calls import Seen
from hf_compressm.families.changes import AttributeChange, MomentTerm, ParameterChange
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
from hf_compressm.families.sampling import sample
from hf_compressm.families.sums import Statistics
from hf_compressm.numerics import BalancedTruncation, Balancing, DiagonalSystem, balance, relative_h2_error, truncate
from hf_compressm.numerics.balancing import NUMERICAL_RANK
from hf_compressm.numerics.ranks import tail_sums
from hf_compressm.scans import diagonal_states
from hf_compressm.utils.devices import on_host


FAILURES = (ValueError, torch.linalg.LinAlgError)
"""Errors of a cut: no stable diagonal system of the size, or a decomposition that did not converge."""


class StateCovariance(Statistics):
    """Covariance of `sqrt(2) [Re h; Im h]` over the tokens of the calibration data, and over both directions."""

    def update(self, seen: Seen) -> None:
        """Add up the states of every scan that the layer runs."""
        if not seen.calls:
            self.obstacle = "no recurrence was seen while it ran: its forward does not call diagonal_scan"
            return
        for number, call in enumerate(seen.calls):
            given = call.arguments
            rows, _ = sample(given["u"].shape[:2], seen.mask, 2 * given["eigenvalues"].numel())
            u, mask = given["u"][rows], None if seen.mask is None else seen.mask[rows]
            mask = u.new_ones(u.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            if number == 0:
                self.add("tokens", mask.sum())
            with maybe_autocast(device_type=u.device.type, enabled=False):
                self._add_up(given, u, mask)

    def _add_up(self, given: Mapping[str, Any], u: Tensor, mask: Tensor) -> None:
        reverse = given.get("reverse", False)
        places = (mask.flip(1) if reverse else mask).to(u.dtype).unsqueeze(-1)
        start = 0
        for states in diagonal_states(u, given["eigenvalues"], given["B"], reverse=reverse):  # (batch, chunk, slots)
            real = torch.cat([states.real, states.imag], dim=-1) * places[:, start : start + states.shape[1]]
            flat = real.flatten(0, 1)
            self.add("covariance", 2 * flat.mT @ flat)
            start += states.shape[1]


@dataclass(frozen=True, eq=False)
class Ranked:
    """A balanced layer, the order of its states (most wanted first), and its last truncation, for reuse."""

    balancing: Balancing
    order: Tensor
    truncations: dict[int, BalancedTruncation] = field(default_factory=dict)

    def truncate(self, slots: int) -> BalancedTruncation:
        """The truncation to a number of complex slots; raises what `truncate` raises."""
        if slots not in self.truncations:
            self.truncations.clear()  # each holds maps of the full order
            self.truncations[slots] = truncate(self.balancing, slots, self.order)
        return self.truncations[slots]


@dataclass(frozen=True, eq=False)
class Reduction:
    """A truncated system, filled up to exactly the wanted number of slots, and its participation factors."""

    system: DiagonalSystem
    truncation: BalancedTruncation
    participation: Tensor  # (r, slots)
    to_reduced: Tensor  # (2r, 2 slots)
    from_reduced: Tensor  # (2 slots, 2r)


@dataclass(frozen=True)
class LinearFamily(Family):
    """Family of layers with a diagonal linear time-invariant system.

    Attributes:
        axes: every tensor of a layer by name, each with the axis that has the slots, or None.
        stabilizing: what keeps the eigenvalues of such a layer below 1, in a message.
    """

    axes: Mapping[str, int | None] = field(default_factory=dict, compare=False)
    stabilizing: str = "clip_eigs=True in the config of an S5, or a lower learning rate"
    tells_texts_apart_by: frozenset[str] = frozenset({"cu_seq_lens_q", "position_ids", "seq_idx"})

    @property
    def mask(self) -> str:
        """That of `DiagonalSSMLayer`."""
        return "mask"

    @abstractmethod
    def parametrize(self, module: Any, reduction: Reduction, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer's own parameters for a reduced system, in double precision, except those of `read_out`.

        Args:
            module: the layer.
            reduction: the system.
            present: the layer's parameters, on the CPU.
        """

    @abstractmethod
    def input_gradient_scale(self, module: Any, values: Mapping[str, Tensor]) -> Tensor:
        """Complex `(slots,)` factor f with `B of the system = f * stored B`, for the given parameter values."""

    def read_out(self, module: Any, C: Tensor) -> dict[str, Tensor]:
        """The parameters that hold C `(H, slots)`, or both read-outs side by side; without conjugate symmetry's 2."""
        C = C / 2 if getattr(module, "conj_sym", False) else C
        return {"C_re": C.real, "C_im": C.imag}

    def matrix_terms(self, module: Any, B_map: Tensor, C_map: Tensor) -> dict[str, tuple[MomentTerm, ...]]:
        """The moment terms of the parameters that hold B and C, for maps of `[Re; Im]` of their axis of states."""
        terms: dict[str, tuple[MomentTerm, ...]] = {}
        terms |= dict(zip(("B_re", "B_im"), _complex_terms((module.B_re, module.B_im), B_map, dim=0), strict=True))
        terms |= dict(zip(("C_re", "C_im"), _complex_terms((module.C_re, module.C_im), C_map, dim=1), strict=True))
        return terms

    def attributes(self, module: Any, size: int) -> tuple[AttributeChange, ...]:
        """What a layer stores of its size besides the shapes of its parameters."""
        return (AttributeChange(module, "state_size", size),)

    def system(self, module: Any) -> DiagonalSystem:
        """The discrete-time system of a layer, on the CPU; C stacks both read-outs of a bidirectional layer."""
        held = copy.copy(module)
        vars(held)["_parameters"] = on_host(dict(module.named_parameters(recurse=False)))
        with torch.no_grad():
            return DiagonalSystem(*held.system(torch.float64))

    def state_axes(self, module: Any) -> Mapping[str, int | None]:
        """Those of the declaration."""
        return self.axes

    def directions(self, module: Any) -> tuple[bool, ...]:
        """Whether each pass over the sequence is reversed."""
        return (False, True) if module.bidirectional else (False,)

    def state_size(self, module: Any) -> int:
        """The state size as the config counts it."""
        return int(module.state_size)

    def state_entries(self, module: Any) -> int:
        """Two real numbers for each complex slot, in each direction."""
        return 2 * int(module.B_re.shape[0]) * len(self.directions(module))

    def at_size(self, module: Any, size: int) -> LayerShape:
        """What a layer would look like: all axes of slots grow alike, also those of two directions."""
        present = self.state_size(module)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, axis in self.axes.items():
            if axis is not None:
                shape = list(getattr(module, name).shape)
                shape[axis] = shape[axis] * size // present
                shapes[name] = tuple(shape)
        return LayerShape(shapes, self.attributes(module, size))

    def criterion(self, wanted: str, calibrated: bool, realization: str = "real") -> str:
        """The criterion to use for `wanted`; complex balancing, the paper's own, uses no measured covariances."""
        if realization == "complex" and wanted == "auto":
            return "hankel"
        if realization == "complex" and wanted == "empirical":
            raise ValueError(
                "criterion='empirical' goes with realization='real'; got realization='complex'. "
                "Use realization='real', or criterion='hankel'."
            )
        return super().criterion(wanted, calibrated, realization)

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """An accumulator of state covariances under `criterion="empirical"`, else None."""
        return StateCovariance() if criterion == "empirical" else None

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Balance the layer's system, in closed form or against the measured covariance."""
        system = self.system(layer.module)
        nothing = torch.full((layer.state_size,), torch.nan, dtype=torch.float64)
        free = torch.zeros(layer.state_size + 1, dtype=torch.float64)
        if not system.is_finite:
            return Measurement(nothing, free, "non-finite parameters")
        if not system.is_stable:
            largest = float(system.eigenvalues.abs().max())
            why = f"unstable, max |eigenvalue| {largest:.6g}; {self.stabilizing}, keeps it below 1"
            return Measurement(nothing, free, why)
        if not has_finite_parameters(layer.module):
            return Measurement(nothing, free, "non-finite parameters")
        if statistics is not None and (problem := statistics.problem):
            return Measurement(nothing, free, problem)
        covariance = None if statistics is None else statistics.mean("covariance")
        if covariance is not None and not bool(torch.isfinite(covariance).all()):
            return Measurement(nothing, free, "non-finite states on the calibration data")
        balancing = balance(system, method.realization, covariance)
        sigma = balancing.hankel_singular_values
        if not float(sigma[0]) > 0:
            return Measurement(sigma, free, "no output energy")
        scores = balancing.state_scores[None]
        detail = Ranked(balancing, kept_order(sigma.numel(), method, layer))
        return Measurement(sigma, _relative_errors(balancing), detail=detail, scores=scores)

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Truncate to the slots that `size` states need, and write the result in the layer's parametrisation."""
        ranked: Ranked = measurement.detail
        slots, note = _slots(layer, ranked, size), measurement.note
        try:
            truncation = ranked.truncate(slots)
        except FAILURES:
            if not ranked.balancing.measured:
                raise
            note = "cut by the closed-form Gramians: the cut against the data was not stable"
            ranked = Ranked(balance(ranked.balancing.system, method.realization), ranked.order)
            truncation = ranked.truncate(slots)
        balancing, sigma = ranked.balancing, ranked.balancing.hankel_singular_values
        kept = sigma[_used(ranked.order, sigma)[: truncation.kept]]
        return LayerCut(
            changes=self._changes(layer, _fill(balancing.system, truncation, slots)),
            attributes=self.attributes(layer.module, size),
            predicted_error=_predicted_error(balancing, truncation, kept),
            error_bound=None if balancing.measured else truncation.error_bound * self._bound_factor(layer.module),
            energy_kept=float(kept.sum() / sigma.sum()),
            note=note,
        )

    def values_kept(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> int:
        """Number of values that a cut keeps: fewer than two per slot if real eigenvalues need slots of their own."""
        count = measurement.hankel_singular_values.numel()
        ranked: Ranked = measurement.detail
        try:
            kept = ranked.truncate(_slots(layer, ranked, size)).kept
        except FAILURES:  # `cut` says why
            return count
        return count if kept == _used(ranked.order, measurement.hankel_singular_values).numel() else kept

    def _bound_factor(self, module: Any) -> float:
        """Factor on the error bound: with two directions, `|E_1| + |E_2| <= sqrt(2) |[E_1; E_2]|`."""
        return 2**0.5 if len(self.directions(module)) == 2 else 1.0

    def _changes(self, layer: SSMLayer, reduction: Reduction) -> tuple[ParameterChange, ...]:
        """New parameters with their moment maps: participation, `T^H` for B, `W^H` for C."""
        module, system = layer.module, reduction.system
        present = on_host(dict(module.named_parameters()))
        values = self.parametrize(module, reduction, present)
        C = torch.cat(system.C.chunk(2), dim=1) if len(self.directions(module)) == 2 else system.C
        values |= self.read_out(module, C)
        terms = self._moment_terms(module, reduction, present, values)
        prefix = f"{layer.name}." if layer.name else ""
        return tuple(
            ParameterChange(f"{prefix}{name}", getattr(module, name), value, terms[name])
            for name, value in values.items()
        )

    def _moment_terms(
        self, module: Any, reduction: Reduction, present: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, tuple[MomentTerm, ...]]:
        """The moment terms of each parameter, for its present values and the new ones."""
        participation = reduction.participation
        old_scale, new_scale = (self.input_gradient_scale(module, each) for each in (present, values))
        B_map = _scale_real(new_scale.conj()) @ reduction.from_reduced.mT @ _scale_real(1 / old_scale.conj())
        sign = torch.ones(reduction.to_reduced.shape[0]), torch.ones(reduction.to_reduced.shape[1])
        for part in sign:
            part[part.numel() // 2 :] = -1
        C_map = sign[0].double()[:, None] * reduction.to_reduced * sign[1].double()
        terms: dict[str, tuple[MomentTerm, ...]] = {
            name: (MomentTerm(getattr(module, name), participation, 0),) for name in values
        }
        C_map = _both_directions(C_map) if len(self.directions(module)) == 2 else C_map
        return terms | self.matrix_terms(module, B_map, C_map)


def _slots(layer: SSMLayer, ranked: Ranked, size: int) -> int:
    """Number of complex slots that `size` states need."""
    return size * ranked.balancing.system.order // layer.state_size


def _used(order: Tensor, sigma: Tensor) -> Tensor:
    """The states that `truncate` considers: all but those without output."""
    return order[sigma[order] > NUMERICAL_RANK * sigma[0]]


def _relative_errors(balancing: Balancing) -> Tensor:
    """Relative error after keeping the first k values, `(n + 1,)`.

    Closed form: the guarantee `2 sum_{i>k} sigma_i / sigma_1`, since `sigma_1 <= ||G||_inf`. Measured covariance: the
    share of the output energy on that data, `sqrt(sum_{i>k} sigma_i^2 / sum sigma_i^2)`.
    """
    sigma = balancing.hankel_singular_values
    if balancing.measured:
        tails = tail_sums(sigma.square())
        return (tails / tails[0]).sqrt()
    return 2 * tail_sums(sigma) / sigma[0]


def _predicted_error(balancing: Balancing, truncation: BalancedTruncation, kept: Tensor) -> float:
    """Relative root-mean-square output error: exact under white input, an estimate on measured data."""
    if balancing.measured:
        return float((1 - kept.square().sum() / balancing.hankel_singular_values.square().sum()).clamp_min(0).sqrt())
    return relative_h2_error(balancing.system, truncation.system)


def _fill(system: DiagonalSystem, truncation: BalancedTruncation, slots: int) -> Reduction:
    """Bring a truncation to exactly `slots` states.

    A slot that no conjugate pair and no real eigenvalue fills repeats one of the slowest states, with B = 0: it adds
    nothing to the output, and its B has a gradient from the first step on.
    """
    reduced = truncation.system
    to_reduced, from_reduced = truncation.to_reduced, truncation.from_reduced
    participation = _participation(to_reduced, from_reduced)
    missing = slots - reduced.order
    if missing > 0:
        slowest = reduced.eigenvalues.abs().argsort(descending=True)
        index = torch.cat([torch.arange(reduced.order), slowest[torch.arange(missing) % reduced.order]])
        alive = (torch.arange(slots) < reduced.order).double()
        reduced = DiagonalSystem(reduced.eigenvalues[index], reduced.B[index] * alive[:, None], reduced.C[:, index])
        rows = torch.cat([index, index + truncation.system.order])
        to_reduced = to_reduced[rows] * alive.repeat(2)[:, None]
        from_reduced = from_reduced[:, rows] * alive.repeat(2)
        participation = participation[index]
    return Reduction(reduced, truncation, participation, to_reduced, from_reduced)


def _participation(to_reduced: Tensor, from_reduced: Tensor) -> Tensor:
    """Participation factors from the real maps: the trace of each 2 x 2 block, rows scaled to sum to one."""
    slots, states = to_reduced.shape[0] // 2, to_reduced.shape[1] // 2
    blocks = (to_reduced * from_reduced.mT).reshape(2, slots, 2, states).sum(dim=(0, 2))
    return blocks / blocks.sum(dim=1, keepdim=True)


def _scale_real(factor: Tensor) -> Tensor:
    """Real `(2n, 2n)` matrix that multiplies `[Re x; Im x]` by a complex factor per entry."""
    real, imaginary = torch.diag(factor.real), torch.diag(factor.imag)
    return torch.cat([torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)])


def _complex_terms(
    sources: tuple[nn.Parameter, nn.Parameter], matrix: Tensor, dim: int
) -> Iterator[tuple[MomentTerm, ...]]:
    """Split a map of `[Re; Im]` into the terms of the real and of the imaginary parameter."""
    for rows in matrix.chunk(2):
        yield tuple(MomentTerm(source, part, dim) for source, part in zip(sources, rows.chunk(2, dim=1), strict=True))


def _both_directions(matrix: Tensor) -> Tensor:
    """The same map for the forward and the backward half of a bidirectional read-out, real and imaginary parts."""
    parts = [[torch.block_diag(part, part) for part in rows.chunk(2, dim=1)] for rows in matrix.chunk(2)]
    return torch.cat([torch.cat(row, dim=1) for row in parts])
