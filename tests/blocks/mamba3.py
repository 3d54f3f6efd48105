"""The layer of Mamba-3 (arXiv 2603.15569) as mamba-ssm 2.3.2 has it, with its recurrence written out.

| symbol | meaning | shape |
|---|---|---|
| alpha | decay of the state, `exp(ADT)`, one number per head | (batch, heads) |
| lambda | weight of the present input, `sigmoid(Trap)`; the last one has `1 - lambda` | (batch, heads) |
| theta | angle of a pair of states, the sum of `pi tanh(Angles) DT` up to now | (batch, heads, angles) |
| k, q | B and C after norm, bias and rotation by theta | (batch, rank, heads, N) |
| v | input; under MIMO one for each rank, `V * MIMO_V` | (batch, rank, heads, head_dim) |
| h | state | (batch, heads, head_dim, N) |

    h_t = alpha_t h_{t-1} + alpha_t DT_t (1 - lambda_t) v_{t-1} k_{t-1}^T + DT_t lambda_t v_t k_t^T
    y_t = h_t q_t + D v_t,   gated by silu(Z)

SISO (rank 1) turns neighbours, states 2i and 2i + 1. MIMO turns states i and N/2 + i. There is an angle for a half of
all pairs or for all (`rope_fraction`), the first ones; the other pairs are not turned. All heads have the same angles
and their own steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import RMSNormGated, step_bias


def mamba3_siso_combined(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    cu_seqlens: None = None,
) -> Tensor:
    """Q, K (batch, length, groups, N), V, Z (batch, length, heads, head_dim), ADT, DT, Trap (batch, heads, length).

    Q_bias, K_bias (heads, N), Angles (batch, length, heads, angles), D (heads,). The result has the shape of V.
    """
    theta = angle_sums(Angles, DT)
    q = turned(by_head(Q, V.shape[2]) + Q_bias, theta, neighbours=True)
    k = turned(by_head(K, V.shape[2]) + K_bias, theta, neighbours=True)
    y = recurrence(q[:, :, None], k[:, :, None], V[:, :, None], ADT, DT, Trap)[:, :, 0]
    y = y if D is None else y + D[:, None] * V
    return y if Z is None else y * F.silu(Z)


def mamba3_mimo_combined(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    MIMO_V: Tensor,
    MIMO_Z: Tensor,
    MIMO_Out: Tensor | None,
    Angles: Tensor,
    D: Tensor,
    Z: Tensor | None,
    chunk_size: int,
    rotary_dim_divisor: int,
    dtype: torch.dtype,
    return_state: bool = False,
    cu_seqlens: None = None,
) -> Tensor:
    """Q, K (batch, length, rank, groups, N), biases (heads, rank, N), MIMO_... (heads, rank, head_dim), rest as SISO.

    Without MIMO_Out the result keeps the axis of ranks, (batch, length, rank, heads, head_dim).
    """
    heads, theta = V.shape[2], angle_sums(Angles, DT)[:, :, None]
    q = turned(by_head(Q, heads) + Q_bias.transpose(0, 1), theta, neighbours=False)
    k = turned(by_head(K, heads) + K_bias.transpose(0, 1), theta, neighbours=False)
    v = V[:, :, None] * MIMO_V.transpose(0, 1)  # (batch, length, rank, heads, head_dim)
    y = recurrence(q, k, v, ADT, DT, Trap) + D[:, None] * v
    y = y if Z is None else y * F.silu(Z[:, :, None] * MIMO_Z.transpose(0, 1))
    return y if MIMO_Out is None else (y * MIMO_Out.transpose(0, 1)).sum(2)


def by_head(vectors: Tensor, heads: int) -> Tensor:
    """Vectors of groups (..., groups, N) for the heads of each group, (..., heads, N)."""
    return vectors.repeat_interleave(heads // vectors.shape[-2], dim=-2)


def angle_sums(angles: Tensor, DT: Tensor) -> Tensor:
    """Theta, (batch, length, heads, angles)."""
    return (torch.pi * torch.tanh(angles) * DT.mT[..., None]).cumsum(1)


def turned(vectors: Tensor, theta: Tensor, neighbours: bool) -> Tensor:
    """Vectors (..., N) with their first pairs rotated by theta (..., angles)."""
    pairs = vectors.unflatten(-1, (-1, 2)) if neighbours else vectors.unflatten(-1, (2, -1)).mT  # (..., N / 2, 2)
    theta = F.pad(theta, (0, pairs.shape[-2] - theta.shape[-1]))
    one, other = pairs.unbind(-1)
    cos, sin = theta.cos(), theta.sin()
    pairs = torch.stack([cos * one - sin * other, sin * one + cos * other], dim=-1)
    return pairs.flatten(-2) if neighbours else pairs.mT.flatten(-2)


def recurrence(q: Tensor, k: Tensor, v: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor) -> Tensor:
    """The states' outputs h_t q_t, one step at a time, (batch, length, rank, heads, head_dim)."""
    alpha, weight = ADT.exp(), torch.sigmoid(Trap)
    before, now = alpha * DT * (1 - weight), DT * weight
    pushes = torch.einsum("blrhp,blrhn->blhpn", v, k)
    h, outputs = torch.zeros_like(pushes[:, 0]), []
    for t in range(q.shape[1]):
        h = alpha[..., t, None, None] * h + now[..., t, None, None] * pushes[:, t]
        if t:
            h = h + before[..., t, None, None] * pushes[:, t - 1]
        outputs.append(torch.einsum("bhpn,brhn->brhp", h, q[:, t]))
    return torch.stack(outputs, dim=1)


class Mamba3(nn.Module):
    """Names and layout of `mamba_ssm.Mamba3`: no convolution, B and C with a norm, a bias, and a rotation."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.expand, self.headdim = d_model, d_state, expand, headdim
        self.chunk_size, self.A_floor = chunk_size, 1e-4
        self.is_outproj_norm, self.is_mimo, self.mimo_rank = is_outproj_norm, is_mimo, mimo_rank if is_mimo else 1
        self.d_inner = expand * d_model
        self.nheads, self.num_bc_heads = self.d_inner // headdim, ngroups
        self.rotary_dim_divisor = int(2 / rope_fraction)
        self.split_tensor_size = int(d_state * rope_fraction) // 2 * 2
        self.num_rope_angles = self.split_tensor_size // 2
        self.in_proj = nn.Linear(d_model, sum(self.widths()), bias=False)
        self.dt_bias = nn.Parameter(step_bias(self.nheads))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, self.mimo_rank, d_state))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, self.mimo_rank, d_state))
        self.B_norm, self.C_norm = RMSNormGated(d_state, eps=1e-5), RMSNormGated(d_state, eps=1e-5)
        if is_mimo:
            shape = (self.nheads, self.mimo_rank, headdim)
            self.mimo_x = nn.Parameter(torch.full(shape, 1 / self.mimo_rank))
            self.mimo_z = nn.Parameter(torch.ones(shape))
            self.mimo_o = nn.Parameter(torch.full(shape, 1 / self.mimo_rank))
        self.D = nn.Parameter(torch.ones(self.nheads))
        if is_outproj_norm:
            self.norm = RMSNormGated(self.d_inner, eps=1e-5, norm_before_gate=True, group_size=headdim)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def widths(self) -> list[int]:
        """Rows of `in_proj`: z, x, B, C, step, decay, trapezoid, angles."""
        vectors = self.d_state * self.num_bc_heads * self.mimo_rank
        return [*[self.d_inner] * 2, vectors, vectors, *[self.nheads] * 3, self.num_rope_angles]

    def forward(self, u: Tensor, seq_idx: None = None, cu_seqlens: None = None) -> Tensor:
        z, x, B, C, dd_dt, dd_A, trap, angles = self.in_proj(u).split(self.widths(), dim=-1)
        z, x = (part.unflatten(-1, (-1, self.headdim)) for part in (z, x))
        B, C = (part.unflatten(-1, (self.mimo_rank, self.num_bc_heads, self.d_state)) for part in (B, C))
        A = -F.softplus(dd_A.float()).clamp(min=self.A_floor)
        DT = F.softplus(dd_dt + self.dt_bias)
        common = {
            "V": x,
            "ADT": (A * DT).mT,
            "DT": DT.mT,
            "Trap": trap.mT,
            "Angles": angles.unsqueeze(-2).expand(-1, -1, self.nheads, -1).float(),
            "D": self.D,
            "Z": None if self.is_outproj_norm else z,
            "chunk_size": self.chunk_size,
            "cu_seqlens": cu_seqlens,
        }
        C, B = self.C_norm(C), self.B_norm(B)
        if self.is_mimo:
            y = self.mixed(C, B, z, common)
        else:
            y = mamba3_siso_combined(
                Q=C.squeeze(2),
                K=B.squeeze(2),
                Q_bias=self.C_bias.squeeze(1),
                K_bias=self.B_bias.squeeze(1),
                Input_States=None,
                return_final_states=False,
                **common,
            ).flatten(2)
            y = self.norm(y, z.flatten(2)) if self.is_outproj_norm else y
        return self.out_proj(y)

    def mixed(self, C: Tensor, B: Tensor, z: Tensor, common: dict) -> Tensor:
        """The MIMO layer's output before the last projection; with a norm, ranks are joined after it."""
        y = mamba3_mimo_combined(
            Q=C,
            K=B,
            Q_bias=self.C_bias,
            K_bias=self.B_bias,
            MIMO_V=self.mimo_x,
            MIMO_Z=self.mimo_z,
            MIMO_Out=None if self.is_outproj_norm else self.mimo_o,
            rotary_dim_divisor=self.rotary_dim_divisor,
            dtype=common["V"].dtype,
            return_state=False,
            **common,
        )
        if self.is_outproj_norm:
            gates = torch.einsum("blhp,hrp->blrhp", z, self.mimo_z).flatten(3)
            y = self.norm(y.flatten(3), gates).unflatten(-1, (-1, self.headdim))
            y = torch.einsum("blrhp,hrp->blhp", y, self.mimo_o)
        return y.flatten(2)


Mamba3.__module__ = "mamba_ssm.modules.mamba3"
