"""Blocks of vision models: Vim (arXiv 2401.09417), and the SS2D of VMamba (arXiv 2401.10166) and MambaIR (2402.15648).

The published code of Vim runs `mamba_inner_fn_no_out_proj` once in each direction, and takes the weight of the output
projection without calling the module. Where kernels are missing, blocks of its kind call `selective_scan_fn` twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm.scans import selective_scan as selective_scan_fn

from .fused import mamba_inner_fn_no_out_proj
from .parts import causal_convolution, decay_logs, rank_of, step_projection


class Vim(nn.Module):
    """The block of Vision Mamba in its second version, with convolution and parameters for each direction."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        use_fast_path: bool = True,
        if_devide_out: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * d_model, rank_of(dt_rank, d_model)
        self.use_fast_path, self.bimamba_type, self.if_devide_out = use_fast_path, "v2", if_devide_out
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d, self.conv1d_b = self.convolution(), self.convolution()
        self.activation, self.act = "silu", nn.SiLU()
        self.x_proj, self.x_proj_b = self.projection(), self.projection()
        self.dt_proj = step_projection(self.dt_rank, self.d_inner)
        self.dt_proj_b = step_projection(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(decay_logs(self.d_inner, d_state))
        self.A_b_log = nn.Parameter(decay_logs(self.d_inner, d_state))
        self.D, self.D_b = nn.Parameter(torch.ones(self.d_inner)), nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def convolution(self) -> nn.Conv1d:
        return causal_convolution(self.d_inner, self.d_conv)

    def projection(self) -> nn.Linear:
        return nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        xz = (self.in_proj.weight @ hidden_states.mT).contiguous()  # (batch, 2 d_inner, length)
        run = self.fused if self.use_fast_path else self.direction
        y = run(xz, "", "A_log") + run(xz.flip(-1), "_b", "A_b_log").flip(-1)
        y = y.mT / 2 if self.if_devide_out else y.mT
        return F.linear(y, self.out_proj.weight) if self.use_fast_path else self.out_proj(y)

    def fused(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        conv1d, x_proj, dt_proj, D = (getattr(self, name + ending) for name in ("conv1d", "x_proj", "dt_proj", "D"))
        return mamba_inner_fn_no_out_proj(
            xz,
            conv1d.weight,
            conv1d.bias,
            x_proj.weight,
            dt_proj.weight,
            -getattr(self, decay).float().exp(),
            None,
            None,
            D.float(),
            delta_bias=dt_proj.bias.float(),
            delta_softplus=True,
        )

    def direction(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        conv1d, x_proj, dt_proj, D = (getattr(self, name + ending) for name in ("conv1d", "x_proj", "dt_proj", "D"))
        x, z = xz.chunk(2, dim=1)
        x = self.act(conv1d(x)[..., : x.shape[-1]])
        dt, B, C = x_proj(x.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = -getattr(self, decay).float().exp()
        bias = dt_proj.bias.float()
        return selective_scan_fn(
            x, dt_proj.weight @ dt.mT, A, B.mT, C.mT, D.float(), z=z, delta_bias=bias, delta_softplus=True
        )


class OffsetVim(Vim):
    """A relative of it: convolutions that look both ways, a bias in `x_proj`, steps that are never below an offset."""

    offset = 0.01

    def __init__(self, d_model: int, d_state: int = 16, dt_rank: int | str = "auto") -> None:
        super().__init__(d_model, d_state, d_conv=3, dt_rank=dt_rank, use_fast_path=False)

    def convolution(self) -> nn.Conv1d:
        return nn.Conv1d(self.d_inner, self.d_inner, self.d_conv, groups=self.d_inner, padding="same")

    def projection(self) -> nn.Linear:
        return nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state)

    def direction(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        conv1d, x_proj, dt_proj, D = (getattr(self, name + ending) for name in ("conv1d", "x_proj", "dt_proj", "D"))
        x, z = xz.chunk(2, dim=1)
        x = self.act(conv1d(x))
        dt, B, C = x_proj(x.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        step = F.softplus(dt_proj(dt)).mT + self.offset
        A = -getattr(self, decay).float().exp()
        return selective_scan_fn(x, step, A, B.mT, C.mT, D, z=z, delta_bias=None, delta_softplus=False)


class SS2D(nn.Module):
    """Scans of a picture along its rows and columns, in both directions: four groups of channels in one scan.

    Args:
        keeps_scan: whether the layer holds the scan from its construction on, as MambaIR's does. VMamba's first
            version takes it from its module at every call.
    """

    DIRECTIONS = 4

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 3,
        expand: int = 2,
        dt_rank: int | str = "auto",
        keeps_scan: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * d_model, rank_of(dt_rank, d_model)
        K, D, R = self.DIRECTIONS, self.d_inner, self.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * D, bias=False)
        self.conv2d = nn.Conv2d(D, D, d_conv, padding=(d_conv - 1) // 2, groups=D)
        self.act = nn.SiLU()
        projections = [nn.Linear(D, R + 2 * d_state, bias=False) for _ in range(K)]
        steps = [step_projection(R, D) for _ in range(K)]
        self.x_proj_weight = nn.Parameter(torch.stack([each.weight.detach() for each in projections]))
        self.dt_projs_weight = nn.Parameter(torch.stack([each.weight.detach() for each in steps]))
        self.dt_projs_bias = nn.Parameter(torch.stack([each.bias.detach() for each in steps]))
        self.A_logs, self.Ds = nn.Parameter(decay_logs(K * D, d_state)), nn.Parameter(torch.ones(K * D))
        if keeps_scan:
            self.selective_scan = selective_scan_fn
        self.out_norm = nn.LayerNorm(D)
        self.out_proj = nn.Linear(D, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, height, width, d_model)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))  # (batch, D, height, width)
        y = self.out_norm(self.scanned(x).to(x.dtype))
        return self.out_proj(y * F.silu(z))

    def scanned(self, x: Tensor) -> Tensor:
        """The sum of the four scans, (batch, height, width, D)."""
        ways = four_ways(x)  # (batch, K, D, length)
        projected = torch.einsum("bkdl,kcd->bkcl", ways, self.x_proj_weight)
        steps, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        steps = torch.einsum("bkrl,kdr->bkdl", steps, self.dt_projs_weight)
        scan = getattr(self, "selective_scan", None) or selective_scan_fn
        y = scan(
            ways.float().flatten(1, 2),  # (batch, K D, length)
            steps.float().flatten(1, 2),
            -self.A_logs.float().exp(),
            B.float(),  # (batch, K, N, length)
            C.float(),
            self.Ds.float(),
            z=None,
            delta_bias=self.dt_projs_bias.float().flatten(),
            delta_softplus=True,
            return_last_state=False,
        )
        return turned_back(y.unflatten(1, (self.DIRECTIONS, -1)), *x.shape[2:])


def four_ways(x: Tensor) -> Tensor:
    """Pictures (batch, D, height, width) by rows, by columns, and both backwards, (batch, 4, D, length)."""
    both = torch.stack([x.flatten(2), x.mT.flatten(2)], dim=1)
    return torch.cat([both, both.flip(-1)], dim=1)


def turned_back(y: Tensor, height: int, width: int) -> Tensor:
    """The sum of the four sequences of a picture at its places, (batch, height, width, D)."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return (rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT).permute(0, 2, 3, 1)
