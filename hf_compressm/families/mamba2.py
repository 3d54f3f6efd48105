"""Mamba-2 layers: one decay per head, N states per group, and a convolution with SiLU over x, B and C.

| symbol | meaning | shape |
|---|---|---|
| x, z | scan input and the gate's input | `(batch, length, heads, head_dim)` |
| dt | step size, softplus of its projection, clamped | `(batch, length, heads)` |
| A | continuous-time decay, `-exp(A_log)` | `(heads,)` |
| B, C | input and read-out, shared by the heads of a group | `(batch, length, groups, N)` |

Discrete time, `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = h_t C_t`. B and C enter the scan as they leave the
convolution, so no linear map of them can be folded into the layer. A cut of a stock layer therefore selects states: it
drops those whose loss costs least without repair. A layer whose class projects B and C after the convolution
(`B_proj`, `C_proj`) is cut by balanced projection, which is optimal; see `numerics.projection`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.changes import AttributeChange, MomentTerm, ParameterAddition, ParameterChange
from hf_compressm.families.family import CutMethod, LayerCut, Measurement, SSMLayer
from hf_compressm.families.layout import Layout, Part, rows, states
from hf_compressm.families.maps import float64
from hf_compressm.families.projecting import in_balanced_states, projection_error, projections
from hf_compressm.families.registry import register
from hf_compressm.families.selective import Selection, SelectiveFamily, parameter_name
from hf_compressm.families.sums import Statistics


PACE_OF_OTHERS = 0.1
"""Of what does not make B and C, when a cut layer is fitted."""


@dataclass(frozen=True)
class Mamba2Family(SelectiveFamily):
    """Family of `Mamba2Mixer`, the Mamba-2 mixers of hybrids, and the layers of mamba-ssm and fla.

    Attributes:
        beside: the projection that `B_proj` and `C_proj` are beside in an optimizer.
    """

    beside: str = "in_proj"

    @property
    def fits_other_states(self) -> bool:
        """Those out of which the others can be read best: the worst choice without a fit, and the best one with it."""
        return True

    @property
    def refit_steps(self) -> int:
        """Half of what a selection costs comes back in so many, see `compare_mamba2.py` of the benchmarks."""
        return 100

    @property
    def refits_within_training(self) -> bool:
        """Training on for the time that a refit takes mends as much."""
        return False

    @property
    def refit_rates(self) -> tuple[float, ...]:
        """Larger steps than elsewhere: B and C come out of a nonlinearity, and have far to go."""
        return (0.2, 0.05)

    def state_entries(self, module: Any) -> int:
        """One number for each channel and state."""
        return inner_width(module) * self.state_size(module)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the order in which states, or balanced states, are kept."""
        measured = super().measure(layer, method, statistics)
        if measured.problem or statistics is None or not self.projects(layer, method):
            return measured
        return in_balanced_states(measured, statistics.mean("P"), statistics.mean("Q"), layer, method)

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Select `size` states of every group, or project onto as many."""
        if not self.projects(layer, method):
            return super().cut(layer, method, measurement, size)
        selection: Selection = measurement.detail
        W, V = projections(selection, size)
        spectrum = measurement.hankel_singular_values
        width = getattr(layer.module, "conv_state_size", layer.state_size)
        changes, additions = _projection_changes(layer, W, V, getattr(layer.module, self.beside).weight)
        return LayerCut(
            changes=changes,
            additions=additions,
            attributes=(AttributeChange(layer.module, self.layout.state_size, size),),
            config_fields={"conv_state_size": width},
            predicted_error=projection_error(selection.P, selection.Q, W, V),
            error_bound=None,
            energy_kept=float(spectrum[:size].sum() / spectrum.sum()),
        )

    def fitted(self, module: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """All parameters; what makes B and C moves fastest, the projections after the convolution if there are any."""
        named = dict(module.named_parameters())
        others = [named[name] for name in self.layout.others if name in named]
        if "B_proj" in named:
            yield from ((named[name], torch.ones_like(named[name])) for name in ("B_proj", "C_proj"))
            others += [slot.tensor for slot in self.layout.slots(module) if isinstance(slot.tensor, nn.Parameter)]
        else:
            yield from ((tensor, rows.clamp_min(PACE_OF_OTHERS)) for tensor, rows in super().fitted(module))
        yield from ((tensor, torch.full_like(tensor, PACE_OF_OTHERS)) for tensor in others)

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """Projection and convolution if states are selected; none if B and C are projected."""
        return () if self.projects(layer, method) else super().cut_parts(layer, method)

    def state_axes(self, module: Any) -> Mapping[str, int | None]:
        """Those of the layout, and of the projections after the convolution."""
        return {**super().state_axes(module), "B_proj": 1, "C_proj": 1}

    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Those of projection and convolution, or those of the projections after it."""
        if getattr(module, "B_proj", None) is not None:
            return {name: (module.B_proj.shape[0], size, module.B_proj.shape[2]) for name in ("B_proj", "C_proj")}
        return super().shapes(module, size)

    def attributes(self, module: Any, size: int, kept: Tensor) -> tuple[AttributeChange, ...]:
        """The state size, and where nothing is projected after the convolution, the widths before it."""
        if getattr(module, "B_proj", None) is not None:
            return (AttributeChange(module, self.layout.state_size, size),)
        return super().attributes(module, size, kept)

    def projects(self, layer: SSMLayer, method: CutMethod) -> bool:
        """Whether B and C are projected after the convolution; a layer with projections keeps them."""
        return method.project or getattr(layer.module, "B_proj", None) is not None


def inner_width(module: Any) -> int:
    """Channels of x, and of the gate."""
    width = getattr(module, "conv_state_size", None) or getattr(module, "ssm_state_size", None) or module.d_state
    groups = getattr(module, "n_groups", None) or module.ngroups
    return int(module.conv1d.weight.shape[0]) - 2 * int(groups) * int(width)


def convolved_width(module: Any, size: int) -> int:
    """Channels of the convolution, with `size` states."""
    return inner_width(module) + 2 * grouped_width(module, size)


def grouped_width(module: Any, size: int) -> int:
    """Channels of B, with `size` states."""
    return int(module.n_groups) * size


def heads(module: Any) -> int:
    """Rows of `in_proj` that make the step sizes."""
    return int(module.A_log.numel())


def _projection_changes(
    layer: SSMLayer, W: Tensor, V: Tensor, beside: nn.Parameter
) -> tuple[tuple[ParameterChange, ...], tuple[ParameterAddition, ...]]:
    """`B_proj` and `C_proj` of a layer: new ones, or the present ones projected further.

    With `B = V B_r` and `C = W^T C_r` the gradients map by the adjoints, `V^T` and W.
    """
    module = layer.module
    forward = {"B_proj": W, "C_proj": V.mT}
    adjoint = {"B_proj": V.mT, "C_proj": W}
    if getattr(module, "B_proj", None) is None:
        added = (ParameterAddition(parameter_name(layer, name), module, forward[name], beside) for name in forward)
        return (), tuple(added)
    changes = (
        ParameterChange(
            parameter_name(layer, name),
            getattr(module, name),
            forward[name] @ float64(getattr(module, name)),
            (MomentTerm(getattr(module, name), adjoint[name], dim=1),),
        )
        for name in forward
    )
    return tuple(changes), ()


_PARTS = (
    rows("in_proj", "*", "B", "C", heads),
    rows("conv1d", "*", "B", "C"),
)
_OTHERS = ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight", "out_proj.bias")
_FOLLOWS = {"conv_dim": convolved_width, "groups_time_state_size": grouped_width}
_STOCK = Layout("ssm_state_size", _PARTS, groups="n_groups", follows=_FOLLOWS, others=_OTHERS)
_MULTIPLIERS = replace(_STOCK, parts=(*_PARTS, Part("mup_vector", -1, ("*", "B", "C", heads))))
_MAMBA_SSM = Layout("d_state", _PARTS, groups="ngroups", others=_OTHERS)
_FIRST_STATE = replace(_MAMBA_SSM, parts=(*_PARTS, states("init_states", by_group=True)))
_FAMILIES = (
    ("mamba2", "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer", "state_size", _STOCK),
    ("bamba", "transformers.models.bamba.modeling_bamba.BambaMixer", "mamba_d_state", _STOCK),
    ("zamba2", "transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer", "mamba_d_state", _STOCK),
    ("falcon_h1", "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer", "mamba_d_state", _MULTIPLIERS),
    (
        "granitemoehybrid",
        "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer",
        "mamba_d_state",
        _STOCK,
    ),
    (
        "nemotron_h",
        "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer",
        "ssm_state_size",
        _STOCK,
    ),
    ("mamba2", "fla.layers.mamba2.Mamba2", "state_size", _STOCK),
    ("mamba2", "mamba_ssm.modules.mamba2.Mamba2", "d_state", _MAMBA_SSM),
    ("mamba2", "mamba_ssm.modules.mamba2_simple.Mamba2Simple", "d_state", _MAMBA_SSM),
    ("mamba2", "mamba_ssm.modules.mamba2_simple.Mamba2Simple", "d_state", _FIRST_STATE, "init_states"),
)

for _family, _type, _field, _layout, *_mark in _FAMILIES:
    register(
        Mamba2Family(
            name=_family,
            module_type=_type,
            size_field=_field,
            per_layer=False,
            criteria=("empirical", "fisher"),
            tells_texts_apart_by=frozenset({"seq_idx"}),
            layout=_layout,
            mark=_mark[0] if _mark else "",
        )
    )
