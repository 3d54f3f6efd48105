"""Mamba-1 layers of transformers and mamba-ssm: a cut selects states, and reads the dropped ones out of the kept ones.

| symbol | meaning | shape |
|---|---|---|
| u, z | scan input after the convolution, and the gate's input | `(batch, groups, channels, length)` |
| Delta | step size, softplus of its projection | `(batch, groups, channels, length)` |
| A | continuous-time decay, `-exp(A_log)` | `(groups, channels, N)` |
| B, C | input and read-out, shared by the channels of a group | `(batch, groups, N, length)` |
| g | loudness at the layer's output, `|silu(z)| * |W_out[:, channel]|` | `(length, batch, groups, channels)` |

Discrete time, `h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t`, `y_t = C_t . h_t`. One group here; Zamba has several.
One set of state indices per group keeps every stock kernel and class usable; see `numerics.interpolation`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from hf_compressm.families.family import (
    CutMethod,
    Measurement,
    MomentTerm,
    ParameterChange,
    SSMLayer,
    Statistics,
    kept_order,
)
from hf_compressm.families.registry import register
from hf_compressm.families.sampling import sampling_stride
from hf_compressm.families.selective import (
    CovarianceStatistics,
    Selection,
    SelectiveFamily,
    Signals,
    float64,
    parameter_name,
    unmeasurable,
)
from hf_compressm.numerics import interpolation, surrogate
from hf_compressm.peft import effective_weight
from hf_compressm.scans import selective_states


STATE_AXES: dict[str, int | None] = {
    "A_log": 1,
    "D": None,
    "in_proj.weight": None,
    "in_proj.bias": None,
    "conv1d.weight": None,
    "conv1d.bias": None,
    "x_proj.weight": 0,
    "dt_proj.weight": None,
    "dt_proj.bias": None,
    "out_proj.weight": None,
    "out_proj.bias": None,
}


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """The arguments of one call of the selective scan, by group."""

    u: Tensor  # (batch, groups, channels, length)
    delta: Tensor  # (batch, groups, channels, length), after softplus
    A: Tensor  # (groups, channels, N)
    B: Tensor  # (batch, groups, N, length)
    C: Tensor  # (batch, groups, N, length)
    z: Tensor  # (batch, groups, channels, length)
    mask: Tensor  # (batch, length), 1 for real tokens and 0 for padding

    def states(self, every: int) -> Iterator[Tensor]:
        """States after every so many steps, in chunks of time, (steps, batch, groups, channels, N)."""
        groups = range(self.A.shape[0])
        streams = [selective_states(self.u[:, g], self.delta[:, g], self.A[g], self.B[:, g]) for g in groups]
        kept = slice(every - 1, None, every)  # chunks have a multiple of `every` steps, but for the last
        if len(streams) == 1:  # most layouts: no copy
            return (chunk[kept].unsqueeze(2) for chunk in streams[0])
        return (torch.stack([chunk[kept] for chunk in chunks], dim=2) for chunks in zip(*streams, strict=True))

    def signals(self, out_weight: Tensor, every: int) -> Signals:
        """The signals to measure, with the states after every so many steps.

        Args:
            out_weight: weight of the output projection, `(hidden, groups * channels)`.
            every: a power of two.
        """
        gain = F.silu(self.z).abs() * out_weight.to(self.z.dtype).norm(dim=0).view(*self.z.shape[1:3], 1)
        gain = (gain * self.mask[:, None, None]).permute(3, 0, 1, 2)
        B, C = self.B.permute(0, 3, 1, 2), self.C.permute(0, 3, 1, 2)
        return Signals(self.states(every), every, gain, B, C, self.mask)


class SurrogateStatistics(Statistics):
    """The averages that the paper's surrogate needs: of `exp(Delta A)`, `Delta B` and C."""

    def __init__(self, family: "MambaFamily") -> None:
        """Start with nothing seen, for layers of this family."""
        super().__init__()
        self.family = family

    def update(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add up the three averages."""
        for hidden_states, mask in self.family.texts(args, kwargs):
            inputs = self.family.scan_inputs(module, hidden_states, mask)
            self.add("tokens", inputs.mask.sum())
            with maybe_autocast(device_type=inputs.u.device.type, enabled=False):
                for step in range(inputs.u.shape[-1]):
                    delta = inputs.delta[..., step]  # (batch, groups, channels)
                    decay = torch.exp(delta[..., None] * inputs.A)  # (batch, groups, channels, N)
                    self.add("a", (decay * inputs.mask[:, step, None, None, None]).sum(dim=0))
                    self.add("b", torch.einsum("bgd,bgn->gdn", delta, inputs.B[..., step]))
                self.add("c", inputs.C.sum(dim=(0, 3)))


@dataclass(frozen=True)
class MambaFamily(SelectiveFamily):
    """Family of `transformers.models.mamba.MambaMixer` and `mamba_ssm.Mamba`."""

    def state_entries(self, module: Any) -> int:
        """One number for each channel and state, as many as A has."""
        return int(module.A_log.numel())

    def scan_inputs(self, module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None) -> ScanInputs:
        """The arguments of the layer's scan, in float32 at least.

        Args:
            module: a Mamba-1 layer.
            hidden_states: its input, `(batch, length, hidden)`.
            attention_mask: `(batch, length)`, 1 for real tokens; padding is set to zero as in the layer.
        """
        mask = None if attention_mask is None else attention_mask[:, None, :].to(hidden_states.dtype)
        hidden_states = hidden_states if mask is None else hidden_states * mask.mT
        u, z = module.in_proj(hidden_states).mT.chunk(2, dim=1)
        u = module.act(module.conv1d(u)[..., : z.shape[-1]])
        u = u if mask is None else u * mask
        size = self.state_size(module)
        time_step, B, C = module.x_proj(u.mT).split([step_rank(module, size), size, size], dim=-1)
        time_step, B, C = self.normalized(module, time_step, B, C)
        dtype = torch.promote_types(u.dtype, torch.float32)
        delta = F.softplus(F.linear(time_step, module.dt_proj.weight).to(dtype) + module.dt_proj.bias.to(dtype)).mT
        A = -torch.exp(module.A_log.to(dtype))
        real = delta.new_ones(delta[:, 0].shape) if attention_mask is None else attention_mask.to(dtype)
        grouped = [signal.to(dtype)[:, None] for signal in (u, delta, B.mT, C.mT, z)]
        return ScanInputs(grouped[0], grouped[1], A[None], grouped[2], grouped[3], grouped[4], real)

    def normalized(self, module: Any, time_step: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step, B and C as the scan takes them: in this layout as they leave the projection."""
        return time_step, B, C

    def signals(self, module: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Signals:
        """The signals of the layer's scan."""
        inputs = self.scan_inputs(module, hidden_states, attention_mask)
        every = sampling_stride(hidden_states, attention_mask, self.state_size(module))
        return inputs.signals(effective_weight(module.out_proj), every)

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """An empty accumulator; all criteria need data."""
        return SurrogateStatistics(self) if criterion == "surrogate" else CovarianceStatistics(self)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs and the order of selection, or those of the averaged systems."""
        if method.criterion != "surrogate":
            return super().measure(layer, method, statistics)
        problem = self.problem(layer, statistics)
        if problem or statistics is None:
            return unmeasurable(layer, problem)
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

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """New `A_log` and `x_proj.weight`, and how their moments follow.

        The kept states keep their decay and input. The gradient of the read-out `C_S` stays the same, that of the
        input `B_S` includes what the dropped states passed on: `R^T g`.
        """
        module, indices, R = layer.module, kept[0], R[0]
        forward, adjoint = projection_maps(step_rank(module, R.shape[0]), indices, R)
        return (
            ParameterChange(
                parameter_name(layer, "A_log"),
                module.A_log,
                float64(module.A_log)[:, indices],
                (MomentTerm(module.A_log, indices, dim=1),),
            ),
            ParameterChange(
                parameter_name(layer, "x_proj.weight"),
                module.x_proj.weight,
                forward @ float64(module.x_proj.weight),
                (MomentTerm(module.x_proj.weight, adjoint, dim=0),),
                row_map=forward,
            ),
        )

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """`x_proj`, the projection to step, B and C."""
        return ("x_proj",)

    def attributes(self, module: Any, size: int, kept: Tensor) -> list[tuple[nn.Module, str, Any]]:
        """The width of `x_proj`."""
        return [(module.x_proj, "out_features", step_rank(module, self.state_size(module)) + 2 * size)]

    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Those of `A_log` and `x_proj`."""
        rows = step_rank(module, self.state_size(module)) + 2 * size
        return {
            "A_log": (*module.A_log.shape[:-1], size),
            "x_proj.weight": (rows, *module.x_proj.weight.shape[1:]),
        }


def step_rank(module: Any, size: int) -> int:
    """Rank of the step size's projection: the number of rows of `x_proj` above those of B and C."""
    return int(module.x_proj.weight.shape[0]) - 2 * size


def projection_maps(rank: int, indices: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of `x_proj`'s rows (step, B, C) and of their gradients, `(rank + 2 r, rank + 2 N)` each."""
    identity = torch.eye(rank, dtype=torch.float64)
    selection = torch.eye(R.shape[0], dtype=torch.float64)[indices]
    return torch.block_diag(identity, selection, R.mT), torch.block_diag(identity, R.mT, selection)


for _type, _size in (
    ("transformers.models.mamba.modeling_mamba.MambaMixer", "ssm_state_size"),
    ("mamba_ssm.modules.mamba_simple.Mamba", "d_state"),
):
    register(
        MambaFamily(
            name="mamba",
            module_type=_type,
            size_field="state_size" if _size == "ssm_state_size" else "d_state",
            per_layer=False,
            criteria=("interpolative", "surrogate"),
            state_size_name=_size,
            state_axes=STATE_AXES,
        )
    )
