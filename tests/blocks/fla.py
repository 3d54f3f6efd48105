"""Mamba layers of flash-linear-attention 0.6: `fla.layers.Mamba` and `Mamba2`.

Parameters are named as in mamba-ssm, sizes as in transformers. A layer returns its output with two more values. In
training it runs a fused function; in evaluation it calls the scan, whose last state it always asks for. The originals
run a loop of their own on a CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.scans import selective_scan as selective_scan_fn
from hf_compressm.scans import ssd_scan as mamba_chunk_scan_combined

from .fused import mamba_inner_fn, mamba_split_conv1d_scan_combined
from .parts import RMSNormGated, causal_conv1d_fn, causal_convolution, decay_logs, rank_of, step_bias, step_projection


Outputs = tuple[Tensor, None, Any]


class FlaMamba(nn.Module):
    """Names and layout of `fla.layers.Mamba`."""

    def __init__(
        self, hidden_size: int, state_size: int = 16, conv_kernel: int = 4, intermediate_size: int = 24
    ) -> None:
        super().__init__()
        self.hidden_size, self.ssm_state_size, self.conv_kernel_size = hidden_size, state_size, conv_kernel
        self.intermediate_size, self.dt_rank = intermediate_size, rank_of("auto", hidden_size)
        self.use_conv_bias, self.use_bias, self.layer_idx = True, False, None
        self.conv1d = causal_convolution(intermediate_size, conv_kernel)
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.x_proj = nn.Linear(intermediate_size, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = step_projection(self.dt_rank, intermediate_size)
        self.A_log = nn.Parameter(decay_logs(intermediate_size, state_size))
        self.D = nn.Parameter(torch.ones(intermediate_size))
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Outputs:
        projected, A = self.in_proj(hidden_states).mT, -self.A_log.float().exp()
        bias = self.dt_proj.bias.float()
        if self.training and not use_cache:
            weights = (self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight)
            out = mamba_inner_fn(
                projected,
                *weights,
                self.out_proj.weight,
                None,
                A,
                None,
                None,
                self.D.float(),
                delta_bias=bias,
                delta_softplus=True,
            )
            return out, None, past_key_values
        x, gate = projected.chunk(2, dim=1)
        x = causal_conv1d_fn(x, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        widths = [self.dt_rank, self.ssm_state_size, self.ssm_state_size]
        step, B, C = self.x_proj(x.mT).split(widths, dim=-1)
        y, _ = selective_scan_fn(
            x,
            self.dt_proj.weight @ step.mT,
            A,
            B.mT,
            C.mT,
            self.D.float(),
            gate,
            bias,
            delta_softplus=True,
            return_last_state=True,
        )
        return self.out_proj(y.mT), None, past_key_values


class FlaMamba2(nn.Module):
    """Names and layout of `fla.layers.Mamba2`; `conv_dim` grows with the state too."""

    def __init__(
        self,
        head_dim: int = 64,
        hidden_size: int = 2048,
        state_size: int = 128,
        expand: int = 2,
        n_groups: int = 1,
        rmsnorm: bool = True,
        chunk_size: int = 256,
    ) -> None:
        super().__init__()
        self.hidden_size, self.expand, self.head_dim = hidden_size, expand, head_dim
        self.ssm_state_size, self.n_groups, self.intermediate_size = state_size, n_groups, expand * hidden_size
        self.num_heads, self.chunk_size, self.conv_kernel_size = self.intermediate_size // head_dim, chunk_size, 4
        self.use_conv_bias, self.use_bias, self.layer_idx, self.rmsnorm = True, False, None, rmsnorm
        self.dt_limit, self.activation, self.act = (0.0, float("inf")), "silu", nn.SiLU()
        self.conv_dim = self.intermediate_size + 2 * n_groups * state_size
        self.conv1d = causal_convolution(self.conv_dim, self.conv_kernel_size)
        self.in_proj = nn.Linear(hidden_size, self.intermediate_size + self.conv_dim + self.num_heads, bias=False)
        self.dt_bias = nn.Parameter(step_bias(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        width = self.intermediate_size
        self.norm = RMSNormGated(width, 1e-5, width // n_groups, norm_before_gate=False) if rmsnorm else None
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.out_proj = nn.Linear(self.intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Outputs:
        projected, A = self.in_proj(hidden_states), -self.A_log.float().exp()
        if self.training and not use_cache:
            out = mamba_split_conv1d_scan_combined(
                projected,
                self.conv1d.weight[:, 0],
                self.conv1d.bias,
                self.dt_bias,
                A,
                D=self.D,
                chunk_size=self.chunk_size,
                seq_idx=None,
                activation=self.activation,
                rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
                rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
                outproj_weight=self.out_proj.weight,
                outproj_bias=None,
                headdim=self.head_dim,
                ngroups=self.n_groups,
                norm_before_gate=False,
                return_final_states=False,
            )
            return out, None, past_key_values
        gate, x_B_C, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        x_B_C = causal_conv1d_fn(x_B_C.mT, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation).mT
        channels = self.n_groups * self.ssm_state_size
        x, B, C = x_B_C.split([self.intermediate_size, channels, channels], dim=-1)
        heads, groups = (self.num_heads, self.head_dim), (self.n_groups, -1)
        y, _ = mamba_chunk_scan_combined(
            x.unflatten(-1, heads),
            dt,
            A,
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
            chunk_size=self.chunk_size,
            D=self.D,
            z=None if self.rmsnorm else gate.unflatten(-1, heads),
            seq_idx=None,
            return_final_states=True,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        y = self.norm(y.flatten(2), gate) if self.rmsnorm else y.flatten(2)
        return self.out_proj(y), None, past_key_values


FlaMamba.__module__, FlaMamba.__qualname__ = "fla.layers.mamba", "Mamba"
FlaMamba2.__module__, FlaMamba2.__qualname__ = "fla.layers.mamba2", "Mamba2"
