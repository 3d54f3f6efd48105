"""Mamba-1 layers of transformers: states are selected, and the dropped ones read out of the kept.

| symbol | meaning | shape |
|---|---|---|
| u, z | scan input after the convolution, and the gate's input | `(batch, channels, length)` |
| Delta | step size, softplus of its projection | `(batch, channels, length)` |
| A | continuous-time decay, `-exp(A_log)` | `(channels, N)` |
| B, C | input and read-out, shared by the channels | `(batch, N, length)` |
| g | loudness of a channel at the layer's output, `|silu(z)| * |W_out[:, channel]|` | `(batch, channels, length)` |

Discrete time, `h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t`, `y_t = C_t . h_t`. One set of
state indices for all channels keeps every stock kernel and class usable; see `numerics.interpolation`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.utils.generic import maybe_autocast

from hf_compressm.adapters.base import (
    Adapter,
    AttributeChange,
    CutMethod,
    LayerCut,
    Measurement,
    MomentTerm,
    ParameterChange,
    SSMLayer,
    Statistics,
    has_finite_parameters,
    kept_order,
)
from hf_compressm.adapters.registry import register
from hf_compressm.numerics import interpolation, surrogate
from hf_compressm.scans import selective_states


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """The arguments of one call of the selective scan."""

    u: Tensor  # (batch, channels, length)
    delta: Tensor  # (batch, channels, length), after softplus
    A: Tensor  # (channels, N)
    B: Tensor  # (batch, N, length)
    C: Tensor  # (batch, N, length)
    z: Tensor  # (batch, channels, length)
    mask: Tensor  # (batch, length), 1 for real tokens and 0 for padding


def scan_inputs(mixer: MambaMixer, hidden_states: Tensor, attention_mask: Tensor | None = None) -> ScanInputs:
    """What the mixer feeds to its scan, in float32 at least.

    Args:
        mixer: a Mamba-1 mixer.
        hidden_states: its input, `(batch, length, hidden)`.
        attention_mask: `(batch, length)`, 1 for real tokens; padded positions are silenced as the mixer does.
    """
    mask = None if attention_mask is None else attention_mask[:, None, :].to(hidden_states.dtype)
    hidden_states = hidden_states if mask is None else hidden_states * mask.mT
    u, z = mixer.in_proj(hidden_states).mT.chunk(2, dim=1)
    u = mixer.act(mixer.conv1d(u)[..., : z.shape[-1]])
    u = u if mask is None else u * mask
    time_step, B, C = mixer.x_proj(u.mT).split([mixer.time_step_rank, *[mixer.ssm_state_size] * 2], dim=-1)
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = F.softplus(F.linear(time_step, mixer.dt_proj.weight).to(dtype) + mixer.dt_proj.bias.to(dtype)).mT
    A = -torch.exp(mixer.A_log.to(dtype))
    real = delta.new_ones(delta[:, 0].shape) if attention_mask is None else attention_mask.to(dtype)
    return ScanInputs(u.to(dtype), delta, A, B.mT.to(dtype), C.mT.to(dtype), z.to(dtype), real)


class MambaStatistics(Statistics):
    """Loudness-weighted state covariance P and read-out covariance Q, and the averages of the paper's surrogate."""

    def __init__(self, criterion: str) -> None:
        """Collect what `criterion` needs."""
        super().__init__()
        self.criterion = criterion

    def update(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """See one call of the mixer's forward."""
        inputs = scan_inputs(module, args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask"))
        self.tokens += int(inputs.mask.sum())
        with maybe_autocast(device_type=inputs.u.device.type, enabled=False):
            if self.criterion == "surrogate":
                self._add_averages(inputs)
            else:
                self._add_covariances(inputs, module.out_proj.weight)

    def _add_covariances(self, inputs: ScanInputs, out_weight: Tensor) -> None:
        size = inputs.A.shape[1]
        loudness = F.silu(inputs.z).abs() * out_weight.to(inputs.z.dtype).norm(dim=0)[:, None]
        loudness = (loudness * inputs.mask[:, None]).permute(2, 0, 1)  # (length, batch, channels)
        start = 0
        for states in selective_states(inputs.u, inputs.delta, inputs.A, inputs.B):  # (chunk, batch, channels, N)
            weighted = states * loudness[start : start + states.shape[0], ..., None]
            flat = weighted.reshape(-1, size)
            self.add("P", flat.mT @ flat)
            start += states.shape[0]
        C = inputs.C.transpose(0, 1).reshape(size, -1)
        self.add("Q", C @ C.mT)

    def _add_averages(self, inputs: ScanInputs) -> None:
        for step in range(inputs.u.shape[-1]):
            delta = inputs.delta[..., step]  # (batch, channels)
            decay = torch.exp(delta[..., None] * inputs.A)  # (batch, channels, N)
            self.add("a", (decay * inputs.mask[:, step, None, None]).sum(dim=0))
            self.add("b", torch.einsum("bd,bn->dn", delta, inputs.B[..., step]))
        self.add("c", inputs.C.sum(dim=(0, 2)))


class MambaAdapter(Adapter):
    """Adapter of `transformers.models.mamba.MambaMixer`."""

    def state_size(self, module: Any) -> int:
        """Number of states per channel."""
        return int(module.A_log.shape[1])

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """Both criteria need data."""
        return MambaStatistics(criterion)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs and the selection order, or those of the averaged systems."""
        if statistics is None:
            raise ValueError(f"{layer.name}: {self.family} layers are measured on calibration data.")
        if not has_finite_parameters(layer.module):
            return _unmeasurable(layer, "non-finite parameters")
        if method.criterion == "surrogate":
            return self._measure_surrogate(layer, method, statistics)
        P, Q = statistics.mean("P"), statistics.mean("Q")
        if not bool(torch.isfinite(P).all() and torch.isfinite(Q).all()):
            return _unmeasurable(layer, "non-finite states")
        sigma = interpolation.empirical_hankel_singular_values(P, Q)
        if not float(sigma[0]) > 0:
            return _unmeasurable(layer, "no output energy")
        order, errors = interpolation.pivoted_selection(P, Q)
        order = order[kept_order(order.numel(), method, layer)]
        return Measurement(sigma, errors, detail=(order, P, Q))

    def _measure_surrogate(self, layer: SSMLayer, method: CutMethod, statistics: Statistics) -> Measurement:
        averages = [statistics.mean(name) for name in ("a", "b", "c")]
        if not all(bool(torch.isfinite(average).all()) for average in averages):
            return _unmeasurable(layer, "non-finite averages")
        P, Q = surrogate.surrogate_gramians(*averages)
        sigma = surrogate.surrogate_hankel_singular_values(P, Q)
        if not float(sigma[0]) > 0:
            return _unmeasurable(layer, "no output energy")
        order = surrogate.surrogate_scores(P, Q).argsort(descending=True, stable=True)
        order = order[kept_order(order.numel(), method, layer)]
        errors = interpolation.relative_errors(surrogate.surrogate_losses(P, Q, order))
        return Measurement(sigma, errors, detail=(order, None, None))

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Select `size` states; under `"interpolative"` fold the dropped ones into the read-out of the kept."""
        order, P, Q = measurement.detail
        kept = order[:size].sort().values
        if P is None:
            R = torch.eye(order.numel(), dtype=torch.float64)[:, kept]
            error = float(measurement.errors[size])
        else:
            R = interpolation.interpolation_matrix(P, kept)
            error = interpolation.selection_error(P, Q, kept, R)
        sigma = measurement.hankel_singular_values
        return LayerCut(
            changes=_parameter_changes(layer, kept, R),
            attributes=(
                AttributeChange(layer.module, "ssm_state_size", size),
                AttributeChange(layer.module.x_proj, "out_features", layer.module.time_step_rank + 2 * size),
            ),
            predicted_error=error,
            error_bound=None,
            energy_kept=float(sigma[:size].sum() / sigma.sum()),
        )


def _parameter_changes(layer: SSMLayer, kept: Tensor, R: Tensor) -> tuple[ParameterChange, ...]:
    """New `A_log` and `x_proj.weight`, and how their moments follow.

    The states of `kept` keep their decay and input. The gradient of the read-out `C_S` is what it was, that of the
    input `B_S` gains what the dropped states passed on: `R^T g`.
    """
    mixer = layer.module
    rank, size = mixer.time_step_rank, R.shape[0]
    selection = torch.eye(size, dtype=torch.float64)[kept]  # (r, N)
    identity = torch.eye(rank, dtype=torch.float64)
    projection = mixer.x_proj.weight.detach().to("cpu", torch.float64)
    change = torch.block_diag(identity, selection, R.mT)
    gradient = torch.block_diag(identity, R.mT, selection)
    A_log = mixer.A_log.detach().to("cpu", torch.float64)
    prefix = f"{layer.name}." if layer.name else ""
    return (
        ParameterChange(f"{prefix}A_log", mixer.A_log, A_log[:, kept], (MomentTerm(mixer.A_log, selection, dim=1),)),
        ParameterChange(
            f"{prefix}x_proj.weight",
            mixer.x_proj.weight,
            change @ projection,
            (MomentTerm(mixer.x_proj.weight, gradient, dim=0),),
        ),
    )


def _unmeasurable(layer: SSMLayer, problem: str) -> Measurement:
    """A measurement that keeps everything and says why."""
    size = layer.state_size
    return Measurement(torch.full((size,), torch.nan, dtype=torch.float64), torch.zeros(size + 1), problem)


register(
    MambaAdapter(
        family="mamba",
        module_type=MambaMixer,
        size_field="state_size",
        per_layer=False,
        criteria=("interpolative", "surrogate"),
    )
)
