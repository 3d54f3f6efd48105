"""Delta nets of this package's classes: queries and keys of a layer are projected behind their L2 norm.

| symbol | meaning | shape |
|---|---|---|
| Q, K | second moments of queries and keys as the recurrence has them | `(key heads, N, N)` |
| U | the projection, with orthonormal rows | `(key heads, r, N)` |
| E | what it drops, `I - U^T U` | `(key heads, N, N)` |

The delta rule sees queries and keys only through their products with keys, and one decay of a head multiplies all of
its states. So the best U of a key head is the one that keeps these products, see `numerics.shared_projection`; no
states are needed for it. They are for the spectrum and the predicted error, `tr(Q E P E) / tr(Q P)`, which takes the
states as they are and knows nothing of what the erase term does with fewer of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.changes import MomentTerm, ParameterAddition, ParameterChange
from hf_compressm.families.family import CutMethod, LayerCut, LayerShape, Measurement, SSMLayer, kept_order
from hf_compressm.families.maps import float64
from hf_compressm.families.selective import SelectiveFamily, parameter_name
from hf_compressm.families.sums import Statistics
from hf_compressm.numerics import interpolation
from hf_compressm.numerics.shared_projection import shared_directions, shared_projection


TILE = 16
PROJECTION = "state_proj"
"""The parameter with U."""


@dataclass(frozen=True, eq=False)
class Directions:
    """The part of a measurement that `cut` needs.

    Attributes:
        bases: `(key heads, N, N)`, orthonormal rows, the most wanted first.
        P: `(key heads, N, N)`, as in `selective.py`.
        Q: `(key heads, N, N)`, second moments of the queries.
        K: `(key heads, N, N)`, second moments of the keys.
        refines: whether the first rows are only where the search for the best projection begins.
    """

    bases: Tensor
    P: Tensor
    Q: Tensor
    K: Tensor
    refines: bool


@dataclass(frozen=True)
class ProjectingFamily(SelectiveFamily):
    """Layers that select states, and layers of this package's classes that project queries and keys onto them."""

    @property
    def cache_axis(self) -> int:
        """A cached state is `(batch, value heads, N, P)`."""
        return -2

    @property
    def reruns(self) -> bool:
        """The moments of the states do not show what norm and erase term make of fewer of them."""
        return True

    @property
    def refit_steps(self) -> int:
        """Most of what a selection costs comes back in so many, see `compare_matrix.py` of the benchmarks."""
        return 100

    def granularity(self, module: Any) -> int:
        """On a GPU a multiple of 16, the tiles of fla's kernels, which refuse odd sizes in 16 bits."""
        weight = next(module.parameters())
        return TILE if weight.device.type == "cuda" else 2 if weight.element_size() == 2 else 1

    def state_size(self, module: Any) -> int:
        """Rows of the projection, or the width of a key head without one."""
        projection = getattr(module, PROJECTION, None)
        return super().state_size(module) if projection is None else int(projection.shape[1])

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the order in which states, or directions, are kept."""
        measured = super().measure(layer, method, statistics)
        if measured.problem or statistics is None or not self.projects(layer, method):
            return measured
        return self.projected(layer, method, statistics, measured)

    def projected(
        self, layer: SSMLayer, method: CutMethod, statistics: Statistics, selecting: Measurement
    ) -> Measurement:
        """The measurement of a layer that projects, from that of one that selects."""
        P, Q, K = (statistics.mean(name) for name in ("P", "Q", "K"))
        bases = torch.stack([shared_directions(*head) for head in zip(Q, K, strict=True)])
        bases = bases[:, kept_order(bases.shape[1], method, layer)]
        losses = torch.stack([_losses(*head) for head in zip(P, Q, bases, strict=True)]).sum(dim=0)
        detail = Directions(bases, P, Q, K, refines=method.keep == "largest")
        return replace(selecting, errors=interpolation.relative_errors(losses), detail=detail)

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Select `size` states of every key head, or project onto as many."""
        if not self.projects(layer, method):
            return super().cut(layer, method, measurement, size)
        found: Directions = measurement.detail
        U = found.bases[:, :size]
        if found.refines:
            U = torch.stack([shared_projection(*head) for head in zip(found.Q, found.K, U, strict=True)])
        changes, additions = projection_changes(layer, U)
        dropped = torch.eye(U.shape[2], dtype=torch.float64) - U.mT @ U
        energy = torch.einsum("hij,hji->", found.Q, found.P)
        lost = torch.einsum("hij,hji->", found.Q @ dropped, found.P @ dropped)
        sigma = measurement.hankel_singular_values
        return LayerCut(
            changes=changes,
            additions=additions,
            attributes=(),
            config_fields=self.config_fields(layer, size),
            predicted_error=float((lost / energy).clamp(0, 1).sqrt()),
            error_bound=None,
            energy_kept=float(sigma[:size].sum() / sigma.sum()),
        )

    def config_fields(self, layer: SSMLayer, size: int) -> dict[str, int]:
        """Fields of this package's configuration, for a layer with `size` states."""
        return {"conv_key_head_dim": self.width(layer.module)}

    def width(self, module: Any) -> int:
        """Channels of a key head before the projection."""
        projection = getattr(module, PROJECTION, None)
        return self.state_size(module) if projection is None else int(projection.shape[2])

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """Projections and convolution if states are selected; none if queries and keys are projected."""
        return () if self.projects(layer, method) else super().cut_parts(layer, method)

    def state_axes(self, module: Any) -> Mapping[str, int | None]:
        """Those of the layout, and of the projection."""
        return {**super().state_axes(module), PROJECTION: 1}

    def fitted(self, module: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The projection; without one, the rows of queries and keys."""
        projection = getattr(module, PROJECTION, None)
        if projection is None:
            yield from super().fitted(module)
        else:
            yield projection, torch.ones_like(projection)

    def at_size(self, module: Any, size: int) -> LayerShape:
        """What a layer would look like: with a projection, only that changes."""
        projection = getattr(module, PROJECTION, None)
        if projection is None:
            return super().at_size(module, size)
        return LayerShape({PROJECTION: (projection.shape[0], size, projection.shape[2])}, ())

    def projects(self, layer: SSMLayer, method: CutMethod) -> bool:
        """Whether queries and keys are projected; a layer with a projection keeps it."""
        return method.project or getattr(layer.module, PROJECTION, None) is not None


def _losses(P: Tensor, Q: Tensor, basis: Tensor) -> Tensor:
    """`tr(Q E P E)` after keeping the first k rows of an orthonormal basis `(N, N)`, k = 0 .. N."""
    shared = (basis @ P @ basis.mT) * (basis @ Q @ basis.mT)
    tails = shared.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def projection_changes(
    layer: SSMLayer, U: Tensor
) -> tuple[tuple[ParameterChange, ...], tuple[ParameterAddition, ...]]:
    """The projection of a layer: a new one, or the present one projected further.

    With `q = U^T q_r` the gradient maps by the adjoint, U.
    """
    present = getattr(layer.module, PROJECTION, None)
    name = parameter_name(layer, PROJECTION)
    if present is None:
        beside = max(layer.module.parameters(), key=Tensor.numel)
        return (), (ParameterAddition(name, layer.module, U, beside),)
    change = ParameterChange(name, present, U @ float64(present), (MomentTerm(present, U, dim=1),))
    return (change,), ()
