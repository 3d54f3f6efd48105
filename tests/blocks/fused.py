"""Functions that run a whole Mamba layer from its parameters: neither the recurrence nor the projections are called.

The originals are kernels of mamba-ssm and of Vision Mamba's fork of it. Signatures and layouts are theirs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compressm.scans import selective_scan, ssd_scan

from .parts import causal_conv1d_fn, gated_norm


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Convolution, projections and scan; xz (batch, 2 channels, length) -> (batch, channels, length)."""
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, "silu")
    widths = [delta_proj_weight.shape[1], A.shape[1], A.shape[1]]
    step, own_B, own_C = F.linear(x.mT, x_proj_weight).split(widths, dim=-1)
    B, C = (own.mT if given is None else given for own, given in ((own_B, B), (own_C, C)))
    B, C = (
        vectors if bias is None else vectors + bias[:, None] for vectors, bias in ((B, B_proj_bias), (C, C_proj_bias))
    )
    delta = F.linear(step, delta_proj_weight).mT
    out = selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(out, Tensor)
    return out


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The same with the output projection; the result is (batch, length, width)."""
    y = mamba_inner_fn_no_out_proj(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, *args, **kwargs)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """A Mamba-2 layer after its input projection, zxbcdt (batch, length, ...); conv1d_weight (channels, width)."""
    heads = A.numel()
    d_ssm = D.numel() if D.dim() == 2 else heads * (headdim or 0)
    convolved = conv1d_weight.shape[0]
    channels = (convolved - d_ssm) // 2  # groups * N
    d_mlp = (zxbcdt.shape[-1] - d_ssm - convolved - heads) // 2
    z0, x0, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, d_ssm, convolved, heads], dim=-1)
    xBC = causal_conv1d_fn(xBC.mT, conv1d_weight, conv1d_bias, activation).mT
    x, B, C = xBC.split([d_ssm, channels, channels], dim=-1)
    by_head, by_group = (heads, d_ssm // heads), (ngroups, channels // ngroups)
    y = ssd_scan(
        x.unflatten(-1, by_head),
        dt,
        A,
        B.unflatten(-1, by_group),
        C.unflatten(-1, by_group),
        chunk_size,
        D=D,
        z=z.unflatten(-1, by_head) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    assert isinstance(y, Tensor)
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        y = gated_norm(y, rmsnorm_weight, rmsnorm_eps, z, d_ssm // ngroups, norm_before_gate)
    y = torch.cat([F.silu(z0) * x0, y], dim=-1) if d_mlp else y
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
