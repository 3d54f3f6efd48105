"""Layers of mamba-ssm 2.3.2: `Mamba`, `Mamba2` and `Mamba2Simple`, with the switches between their paths.

| layer | switch | fused function, instead of the calls of recurrence and output projection |
|---|---|---|
| Mamba | `use_fast_path`, where causal-conv1d is installed | `mamba_inner_fn` |
| Mamba2, Mamba2Simple | `use_mem_eff_path` | `mamba_split_conv1d_scan_combined` |

`causal_conv1d_fn` is None where that package is not installed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm.scans import selective_scan as selective_scan_fn
from hf_compressm.scans import ssd_scan

from . import parts
from .fused import mamba_inner_fn, mamba_split_conv1d_scan_combined
from .parts import RMSNormGated, causal_convolution, decay_logs, rank_of, step_bias, step_projection


causal_conv1d_fn: Callable[..., Tensor] | None = parts.causal_conv1d_fn
NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(*args: Any, return_varlen_states: bool = False, **kwargs: Any) -> Any:
    """Mamba-ssm's name for the scan; it has an argument that `ssd_scan` has not, and `Mamba2` passes it."""
    assert not return_varlen_states
    return ssd_scan(*args, **kwargs)


def convolved(conv1d: nn.Conv1d, act: nn.Module, x: Tensor) -> Tensor:
    """The causal convolution of x (batch, channels, length), by the kernel or by the module."""
    if causal_conv1d_fn is None:
        return act(conv1d(x)[..., : x.shape[-1]])
    return causal_conv1d_fn(x=x, weight=conv1d.weight[:, 0], bias=conv1d.bias, activation="silu")


class Mamba(nn.Module):
    """Names and layout of `mamba_ssm.Mamba`."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * d_model, rank_of(dt_rank, d_model)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = causal_convolution(self.d_inner, d_conv, conv_bias)
        self.activation, self.act = "silu", nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = step_projection(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(decay_logs(self.d_inner, d_state))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        xz = self.in_proj.weight @ hidden_states.mT  # (batch, 2 d_inner, length); the module is not called
        xz = xz if self.in_proj.bias is None else xz + self.in_proj.bias[:, None]
        A, D, delta_bias = -self.A_log.float().exp(), self.D.float(), self.dt_proj.bias.float()
        if self.use_fast_path and causal_conv1d_fn is not None and inference_params is None:
            return mamba_inner_fn(
                xz,
                self.conv1d.weight,
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self.out_proj.weight,
                self.out_proj.bias,
                A,
                None,
                None,
                D,
                delta_bias=delta_bias,
                delta_softplus=True,
            )
        x, z = xz.chunk(2, dim=1)
        x = convolved(self.conv1d, self.act, x)
        dt, B, C = self.x_proj(x.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan_fn(
            x,
            self.dt_proj.weight @ dt.mT,
            A,
            B.mT.contiguous(),
            C.mT.contiguous(),
            D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
            return_last_state=False,
        )
        return self.out_proj(y.mT)


class Mamba2(nn.Module):
    """Names and layout of `mamba_ssm.Mamba2`; with `d_ssm`, a gated MLP runs beside the scan."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.headdim, self.ngroups = expand * d_model, headdim, ngroups
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.activation, self.chunk_size = dt_limit, "silu", chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        convolved_channels = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias)
        self.conv1d = causal_convolution(convolved_channels, d_conv, conv_bias)
        self.act = nn.SiLU()
        self.dt_bias = nn.Parameter(step_bias(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            self.norm = RMSNormGated(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, u: Tensor, seqlen: None = None, seq_idx: Tensor | None = None) -> Tensor:
        """The scan's own dt_softplus and dt_bias; `dt_limit` only where one is set."""
        zxbcdt = self.in_proj(u)
        A, limits = -self.A_log.float().exp(), {} if self.dt_limit == NO_LIMIT else {"dt_limit": self.dt_limit}
        D = self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D
        if self.use_mem_eff_path:
            return mamba_split_conv1d_scan_combined(
                zxbcdt,
                self.conv1d.weight[:, 0],
                self.conv1d.bias,
                self.dt_bias,
                A,
                D=D,
                chunk_size=self.chunk_size,
                seq_idx=seq_idx,
                activation=self.activation,
                rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
                rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
                outproj_weight=self.out_proj.weight,
                outproj_bias=self.out_proj.bias,
                headdim=None if self.D_has_hdim else self.headdim,
                ngroups=self.ngroups,
                norm_before_gate=self.norm_before_gate,
                **limits,
            )
        channels, heads, groups = self.ngroups * self.d_state, (self.nheads, self.headdim), (self.ngroups, -1)
        d_mlp = self.d_inner - self.d_ssm
        widths = [d_mlp, d_mlp, self.d_ssm, self.d_ssm + 2 * channels, self.nheads]
        z0, x0, z, xBC, dt = zxbcdt.split(widths, dim=-1)
        xBC = convolved(self.conv1d, self.act, xBC.mT).mT
        x, B, C = xBC.split([self.d_ssm, channels, channels], dim=-1)
        y = mamba_chunk_scan_combined(
            x.unflatten(-1, heads),
            dt,
            A,
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
            chunk_size=self.chunk_size,
            D=D,
            z=None if self.rmsnorm else z.unflatten(-1, heads),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            seq_idx=seq_idx,
            cu_seqlens=None,
            **limits,
            return_final_states=False,
            return_varlen_states=False,
        ).flatten(2)
        y = self.norm(y, z) if self.rmsnorm else y
        return self.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1) if d_mlp else y)


class Mamba2Simple(nn.Module):
    """Names and layout of `mamba_ssm.modules.mamba2_simple.Mamba2Simple`; a learned first state is as wide as N."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        dt_limit: tuple[float, float] = NO_LIMIT,
        learnable_init_states: bool = False,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.headdim, self.ngroups = expand * d_model, headdim, ngroups
        self.nheads = self.d_inner // headdim
        self.dt_limit, self.activation, self.chunk_size = dt_limit, "swish", chunk_size
        self.learnable_init_states, self.use_mem_eff_path = learnable_init_states, use_mem_eff_path
        convolved_channels = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + convolved_channels + self.nheads, bias=False)
        self.conv1d = causal_convolution(convolved_channels, d_conv)
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(self.nheads, headdim, d_state))
        self.act = nn.SiLU()
        self.dt_bias = nn.Parameter(step_bias(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNormGated(self.d_inner, 1e-5, norm_before_gate=False)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Outside of the fused path the softplus of the step is taken before the scan, which gets no bias."""
        zxbcdt = self.in_proj(u)
        A, limits = -self.A_log.exp(), {} if self.dt_limit == NO_LIMIT else {"dt_limit": self.dt_limit}
        first = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        if self.use_mem_eff_path:
            return mamba_split_conv1d_scan_combined(
                zxbcdt,
                self.conv1d.weight[:, 0],
                self.conv1d.bias,
                self.dt_bias,
                A,
                D=self.D,
                chunk_size=self.chunk_size,
                seq_idx=seq_idx,
                activation=self.activation,
                rmsnorm_weight=self.norm.weight,
                rmsnorm_eps=self.norm.eps,
                outproj_weight=self.out_proj.weight,
                outproj_bias=self.out_proj.bias,
                headdim=self.headdim,
                ngroups=self.ngroups,
                norm_before_gate=False,
                initial_states=first,
                **limits,
            )
        channels, groups = self.ngroups * self.d_state, (self.ngroups, -1)
        z, xBC, dt = zxbcdt.split([self.d_inner, self.d_inner + 2 * channels, self.nheads], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        x, B, C = convolved(self.conv1d, self.act, xBC.mT).mT.split([self.d_inner, channels, channels], dim=-1)
        y = mamba_chunk_scan_combined(
            x.unflatten(-1, (self.nheads, self.headdim)),
            dt,
            A,
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
            chunk_size=self.chunk_size,
            D=self.D,
            z=None,
            seq_idx=seq_idx,
            initial_states=first,
            **limits,
        )
        return self.out_proj(self.norm(y.flatten(2), z))


for layer, module in ((Mamba, "mamba_simple"), (Mamba2, "mamba2"), (Mamba2Simple, "mamba2_simple")):
    layer.__module__ = f"mamba_ssm.modules.{module}"
