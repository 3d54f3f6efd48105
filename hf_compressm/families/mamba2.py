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

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm.families.family import (
    AttributeChange,
    CutMethod,
    LayerCut,
    LayerShape,
    Measurement,
    MomentTerm,
    ParameterAddition,
    ParameterChange,
    SSMLayer,
    Statistics,
    kept_order,
)
from hf_compressm.families.registry import register
from hf_compressm.families.sampling import sampling_stride
from hf_compressm.families.selective import Selection, SelectiveFamily, Signals, float64, parameter_name
from hf_compressm.numerics import interpolation
from hf_compressm.numerics.projection import balanced_projection, projection_errors
from hf_compressm.peft import effective_weight
from hf_compressm.scans import ssd_scan, ssd_states


STATE_AXES: dict[str, int | None] = {
    "A_log": None,
    "D": None,
    "dt_bias": None,
    "in_proj.weight": 0,
    "in_proj.bias": 0,
    "conv1d.weight": 0,
    "conv1d.bias": 0,
    "norm.weight": None,
    "out_proj.weight": None,
    "out_proj.bias": None,
    "mup_vector": -1,
    "B_proj": 1,
    "C_proj": 1,
}


@dataclass(frozen=True)
class Shape:
    """Widths of a layer, read from its tensors."""

    heads: int
    groups: int
    width: int  # channels of B, and of C, per group in the convolution
    inner: int  # channels of x

    @classmethod
    def of(cls, module: Any) -> "Shape":
        """The widths of a layer as it is now."""
        groups = int(getattr(module, "n_groups", None) or module.ngroups)
        size = getattr(module, "conv_state_size", None) or getattr(module, "ssm_state_size", None) or module.d_state
        convolved = int(module.conv1d.weight.shape[0])
        return cls(int(module.A_log.numel()), groups, int(size), convolved - 2 * groups * int(size))

    @property
    def convolved(self) -> int:
        """Number of channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.width

    def rows(self, kept: Tensor) -> Tensor:
        """Channels of the convolution that stay if every group keeps the states `kept` `(groups, r)`."""
        B = (self.inner + torch.arange(self.groups)[:, None] * self.width + kept).flatten()
        return torch.cat([torch.arange(self.inner), B, B + self.groups * self.width])

    def projected_rows(self, kept: Tensor, total: int) -> Tensor:
        """Rows of `in_proj`, which has `total`, that stay: all before x, those of x, the kept B and C, and of dt."""
        start = total - self.heads - self.convolved
        return torch.cat([torch.arange(start), start + self.rows(kept), torch.arange(total - self.heads, total)])


@dataclass(frozen=True)
class Mamba2Family(SelectiveFamily):
    """Family of `Mamba2Mixer`, the Mamba-2 mixers of hybrids, and `mamba_ssm.Mamba2`."""

    reads_out: bool = False
    tells_texts_apart_by: frozenset[str] = frozenset({"seq_idx"})

    def state_entries(self, module: Any) -> int:
        """One number for each channel and state."""
        return Shape.of(module).inner * self.state_size(module)

    def state_widths(self, module: Any) -> set[int]:
        """The states of one group, and of all groups side by side."""
        return {self.state_size(module), Shape.of(module).groups * self.state_size(module)}

    def signals(self, module: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
        """The signals of the layer's scan."""
        shape = Shape.of(module)
        mask = None if attention_mask is None else attention_mask[..., None].to(hidden_states.dtype)
        hidden_states = hidden_states if mask is None else hidden_states * mask
        projected = module.in_proj(hidden_states * getattr(module, "ssm_in_multiplier", 1.0))
        projected = projected * getattr(module, "mup_vector", 1.0)
        start = projected.shape[-1] - shape.heads - shape.convolved - shape.inner
        z, x_B_C, dt = projected[..., start:].split([shape.inner, shape.convolved, shape.heads], dim=-1)
        x_B_C = module.act(module.conv1d(x_B_C.mT)[..., : x_B_C.shape[1]]).mT
        x_B_C = x_B_C if mask is None else x_B_C * mask
        dtype = torch.promote_types(x_B_C.dtype, torch.float32)
        channels = shape.groups * shape.width
        x, B, C = x_B_C.to(dtype).split([shape.inner, channels, channels], dim=-1)
        x, z = (signal.unflatten(-1, (shape.heads, -1)) for signal in (x, z.to(dtype)))
        B = _projected(B.unflatten(-1, (shape.groups, -1)), getattr(module, "B_proj", None))
        C = _projected(C.unflatten(-1, (shape.groups, -1)), getattr(module, "C_proj", None))
        limits = getattr(module, "time_step_limit", None) or module.dt_limit
        dt = F.softplus(dt.to(dtype) + module.dt_bias.to(dtype)).clamp(*limits)
        A = -torch.exp(module.A_log.to(dtype))
        real = dt.new_ones(dt.shape[:2]) if attention_mask is None else attention_mask.to(dtype)
        y = cast(Tensor, ssd_scan(x, dt, A, B, C, D=_feed_through(module, shape)))
        gain = _loudness(module, y, z) * real[..., None, None]
        every = sampling_stride(x, attention_mask, B.shape[-1])
        chunks = ssd_states(x, dt, A, B, every=every)
        states = (chunk.unflatten(2, (shape.groups, -1)).flatten(3, 4) for chunk in chunks)
        gain = gain.transpose(0, 1).unflatten(2, (shape.groups, -1)).flatten(3, 4)
        return Signals(states, every, gain, B, C, real)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the order in which states, or balanced states, are kept."""
        measured = super().measure(layer, method, statistics)
        if measured.problem or statistics is None or not self._projects(layer, method):
            return measured
        P, Q = statistics.mean("P"), statistics.mean("Q")
        sigma = interpolation.empirical_hankel_singular_values(P, Q)  # (groups, N)
        order = torch.arange(sigma.shape[1])[kept_order(sigma.shape[1], method, layer)]
        tails = torch.stack([projection_errors(one).square() * one.square().sum() for one in sigma]).sum(dim=0)
        detail = Selection(order.expand_as(sigma), P, Q, reads_out=False)
        errors = interpolation.relative_errors(tails)
        return replace(measured, errors=errors, detail=detail)

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Select `size` states of every group, or project onto as many."""
        if not self._projects(layer, method):
            return super().cut(layer, method, measurement, size)
        selection: Selection = measurement.detail
        kept = selection.orders[:, :size].sort(dim=-1).values
        pairs = [balanced_projection(*group) for group in zip(selection.P, selection.Q, kept, strict=True)]
        W, V = (torch.stack(parts) for parts in zip(*pairs, strict=True))  # (groups, r, N), (groups, N, r)
        spectrum = measurement.hankel_singular_values
        width = Shape.of(layer.module).width
        changes, additions = _projection_changes(layer, W, V)
        return LayerCut(
            changes=changes,
            additions=additions,
            attributes=(AttributeChange(layer.module, self.state_size_name, size),),
            config_fields={"conv_state_size": width},
            predicted_error=_projection_error(selection.P, selection.Q, W, V),
            error_bound=None,
            energy_kept=float(spectrum[:size].sum() / spectrum.sum()),
        )

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """`in_proj` and `conv1d` with the rows that stay."""
        module, shape = layer.module, Shape.of(layer.module)
        convolved = shape.rows(kept)
        projected = shape.projected_rows(kept, module.in_proj.weight.shape[0])
        found = {
            "in_proj.weight": (module.in_proj.weight, projected),
            "in_proj.bias": (module.in_proj.bias, projected),
            "conv1d.weight": (module.conv1d.weight, convolved),
            "conv1d.bias": (module.conv1d.bias, convolved),
        }
        return tuple(
            ParameterChange(
                parameter_name(layer, name),
                parameter,
                parameter.detach()[rows.to(parameter.device)],
                (MomentTerm(parameter, rows, dim=0),),
                row_map=rows,
            )
            for name, (parameter, rows) in found.items()
            if parameter is not None
        )

    @property
    def selects_rows(self) -> bool:
        """True: nothing is folded into the projection or the convolution."""
        return True

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """Projection and convolution if states are selected; none if B and C are projected."""
        return () if self._projects(layer, method) else ("in_proj", "conv1d")

    def attributes(self, module: Any, size: int, kept: Tensor) -> list[tuple[nn.Module, str, Any]]:
        """The widths of convolution and projection, and FalconH1's multipliers."""
        shape = Shape.of(module)
        smaller = Shape(shape.heads, shape.groups, size, shape.inner)
        total = int(module.in_proj.weight.shape[0]) - shape.convolved + smaller.convolved
        changes: list[tuple[nn.Module, str, Any]] = [(module.in_proj, "out_features", total)]
        changes += [(module.conv1d, name, smaller.convolved) for name in ("in_channels", "out_channels", "groups")]
        derived = {"conv_dim": smaller.convolved, "groups_time_state_size": shape.groups * size}
        changes += [(module, name, value) for name, value in derived.items() if hasattr(module, name)]
        if hasattr(module, "mup_vector"):
            rows = shape.projected_rows(kept, module.mup_vector.shape[-1])
            changes.append((module, "mup_vector", module.mup_vector[..., rows.to(module.mup_vector.device)]))
        return changes

    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Those of projection and convolution, or those of the projections after it."""
        if getattr(module, "B_proj", None) is not None:
            return {name: (module.B_proj.shape[0], size, module.B_proj.shape[2]) for name in ("B_proj", "C_proj")}
        shape = Shape.of(module)
        convolved = Shape(shape.heads, shape.groups, size, shape.inner).convolved
        rows = {"in_proj": int(module.in_proj.weight.shape[0]) - shape.convolved + convolved, "conv1d": convolved}
        found = {
            f"{part}.{name}": getattr(getattr(module, part), name) for part in rows for name in ("weight", "bias")
        }
        return {
            name: (rows[name.split(".")[0]], *value.shape[1:]) for name, value in found.items() if value is not None
        }

    def at_size(self, module: Any, size: int) -> LayerShape:
        """What a layer would look like; the width of the convolution stays where B and C are projected after it."""
        if getattr(module, "B_proj", None) is not None:
            return LayerShape(self.shapes(module, size), (AttributeChange(module, self.state_size_name, size),))
        return super().at_size(module, size)

    def _projects(self, layer: SSMLayer, method: CutMethod) -> bool:
        """Whether B and C are projected after the convolution; a layer with projections keeps them."""
        return method.project or getattr(layer.module, "B_proj", None) is not None


def _projected(signal: Tensor, weight: Tensor | None) -> Tensor:
    """A signal `(batch, length, groups, M)`, multiplied by one matrix `(N, M)` per group if there is a weight."""
    return signal if weight is None else torch.einsum("blgm,gnm->blgn", signal, weight.to(signal.dtype))


def _feed_through(module: Any, shape: Shape) -> Tensor:
    """D, `(heads,)` or `(heads, head_dim)`."""
    return module.D if module.D.numel() == shape.heads else module.D.view(shape.heads, -1)


def _loudness(module: Any, y: Tensor, z: Tensor) -> Tensor:
    """Gain from the scan's output to the layer's, in the shape of `y`, `(batch, length, heads, head_dim)`.

    The gated norm multiplies a head by its weights and by one factor per token, however it is grouped and whether it
    gates before or after. This factor is computed from the result of the norm.
    """
    gate = F.silu(z).abs()
    columns = effective_weight(module.out_proj).to(y.dtype).norm(dim=0)[-y.shape[2] * y.shape[3] :].view(y.shape[2:])
    weight = getattr(getattr(module, "norm", None), "weight", None)
    if weight is None:
        return gate * columns
    plain = y * F.silu(z) * weight.to(y.dtype).view(y.shape[2:])
    normed = module.norm(y.flatten(2), z.flatten(2)).view_as(y).to(y.dtype)
    power = plain.square().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    return gate * weight.to(y.dtype).abs().view(y.shape[2:]) * columns * (plain * normed).sum(-1, keepdim=True) / power


def _projection_changes(
    layer: SSMLayer, W: Tensor, V: Tensor
) -> tuple[tuple[ParameterChange, ...], tuple[ParameterAddition, ...]]:
    """`B_proj` and `C_proj` of a layer: new ones, or the present ones projected further.

    With `B = V B_r` and `C = W^T C_r` the gradients map by the adjoints, `V^T` and W.
    """
    module = layer.module
    forward = {"B_proj": W, "C_proj": V.mT}
    adjoint = {"B_proj": V.mT, "C_proj": W}
    if getattr(module, "B_proj", None) is None:
        beside = module.in_proj.weight
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


def _projection_error(P: Tensor, Q: Tensor, W: Tensor, V: Tensor) -> float:
    """Predicted relative output error of all groups together."""
    defect = torch.eye(P.shape[-1], dtype=torch.float64) - V @ W
    lost = torch.einsum("gij,gji->", Q, defect @ P @ defect.mT)
    return float((lost / torch.einsum("gij,gji->", Q, P)).clamp(0, 1).sqrt())


_FAMILIES = (
    ("mamba2", "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer", "state_size"),
    ("bamba", "transformers.models.bamba.modeling_bamba.BambaMixer", "mamba_d_state"),
    ("zamba2", "transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer", "mamba_d_state"),
    ("falcon_h1", "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer", "mamba_d_state"),
    (
        "granitemoehybrid",
        "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer",
        "mamba_d_state",
    ),
    ("nemotron_h", "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer", "ssm_state_size"),
)

for _family, _type, _field in _FAMILIES:
    register(
        Mamba2Family(
            name=_family,
            module_type=_type,
            size_field=_field,
            per_layer=False,
            criteria=("empirical",),
            state_axes=STATE_AXES,
        )
    )
register(
    Mamba2Family(
        name="mamba2",
        module_type="mamba_ssm.modules.mamba2.Mamba2",
        size_field="d_state",
        per_layer=False,
        criteria=("empirical",),
        state_axes=STATE_AXES,
        state_size_name="d_state",
        input_name="u",
    )
)
