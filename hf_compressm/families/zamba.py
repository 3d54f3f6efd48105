"""Zamba's Mamba-1 layers: several heads with B, C and states of their own, which are cut one by one."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm.families.family import CutMethod, MomentTerm, ParameterChange, SSMLayer
from hf_compressm.families.mamba import MambaFamily, ScanInputs, projection_maps
from hf_compressm.families.registry import register
from hf_compressm.families.selective import Selection, float64, parameter_name


@dataclass(frozen=True)
class ZambaFamily(MambaFamily):
    """Family of `ZambaMambaMixer`; a group is a head."""

    def scan_inputs(self, module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None) -> ScanInputs:
        """The arguments of the layer's scans, in float32 at least; parameters as in Mamba."""
        mask = None if attention_mask is None else attention_mask[:, None, :].to(hidden_states.dtype)
        hidden_states = hidden_states if mask is None else hidden_states * mask.mT
        batch, length, _ = hidden_states.shape
        heads, channels, rank = module.dt_proj_weight.shape
        # input and gate alternate channel by channel
        u, z = module.in_proj(hidden_states).mT.reshape(batch, -1, 2, length).unbind(dim=2)
        u = module.act(module.conv1d(u)[..., :length])
        u = u if mask is None else u * mask
        u, z = (signal.reshape(batch, heads, channels, length) for signal in (u, z))
        size = self.state_size(module)
        time_step, B, C = (module.x_proj_weight @ u).split([rank, size, size], dim=-2)
        dtype = torch.promote_types(u.dtype, torch.float32)
        delta = (module.dt_proj_weight @ time_step).to(dtype) + module.dt_proj_bias.to(dtype)[..., None]
        real = delta.new_ones(batch, length) if attention_mask is None else attention_mask.to(dtype)
        A = -torch.exp(module.A_log.to(dtype))
        return ScanInputs(u.to(dtype), F.softplus(delta), A, B.to(dtype), C.to(dtype), z.to(dtype), real)

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """New `A_log` and `x_proj_weight`, head by head as in Mamba."""
        module = layer.module
        rank = module.dt_proj_weight.shape[-1]
        maps = [projection_maps(rank, indices, head) for indices, head in zip(kept, R, strict=True)]
        forward, adjoint = (torch.stack(parts) for parts in zip(*maps, strict=True))
        selected = torch.eye(R.shape[1], dtype=torch.float64)[kept]  # (heads, r, N)
        return (
            ParameterChange(
                parameter_name(layer, "A_log"),
                module.A_log,
                float64(module.A_log) @ selected.mT,
                (MomentTerm(module.A_log, selected, dim=2),),
            ),
            ParameterChange(
                parameter_name(layer, "x_proj_weight"),
                module.x_proj_weight,
                forward @ float64(module.x_proj_weight),
                (MomentTerm(module.x_proj_weight, adjoint, dim=1),),
            ),
        )

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """No modules: the projections are parameters of the layer itself."""
        return ()

    def attributes(self, module: Any, size: int, kept: Tensor) -> list[tuple[nn.Module, str, Any]]:
        """Nothing besides the state size."""
        return []

    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Those of `A_log` and `x_proj_weight`."""
        heads, rows, channels = module.x_proj_weight.shape
        rank = rows - 2 * self.state_size(module)
        return {"A_log": (*module.A_log.shape[:-1], size), "x_proj_weight": (heads, rank + 2 * size, channels)}


register(
    ZambaFamily(
        name="zamba",
        module_type="transformers.models.zamba.modeling_zamba.ZambaMambaMixer",
        size_field="mamba_d_state",
        per_layer=False,
        criteria=("interpolative", "surrogate"),
        state_axes={
            "A_log": 2,
            "D": None,
            "in_proj.weight": None,
            "in_proj.bias": None,
            "conv1d.weight": None,
            "conv1d.bias": None,
            "x_proj_weight": 1,
            "dt_proj_weight": None,
            "dt_proj_bias": None,
            "out_proj.weight": None,
            "out_proj.bias": None,
        },
    )
)
