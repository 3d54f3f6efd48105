"""What the blocks share: initial values, the convolution, the gated norm, and the path of a class."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


SMALLEST_STEP, LARGEST_STEP = 0.001, 0.1
"""Step sizes at initialisation, as in the Mamba paper (arXiv 2312.00752, section 3.6)."""


def at_path(block: type[nn.Module], path: str) -> type[nn.Module]:
    """The same block as a class of another dotted path, by which families know it."""
    module, _, name = path.rpartition(".")
    return type(name, (block,), {"__module__": module, "__doc__": block.__doc__})


def step_bias(*shape: int) -> Tensor:
    """Biases whose softplus is spread log-uniformly over the initial step sizes."""
    low, high = math.log(SMALLEST_STEP), math.log(LARGEST_STEP)
    step = torch.empty(shape).uniform_(low, high).exp()
    return step + torch.log(-torch.expm1(-step))


def step_projection(rank: int, channels: int) -> nn.Linear:
    """The projection from the low-rank step to one per channel."""
    projection = nn.Linear(rank, channels)
    with torch.no_grad():
        projection.bias.copy_(step_bias(channels))
    return projection


def decay_logs(channels: int, d_state: int) -> Tensor:
    """`A = -(1, ..., N)` for every channel, as logarithms."""
    return torch.arange(1.0, d_state + 1).log().repeat(channels, 1)


def rank_of(dt_rank: int | str, d_model: int) -> int:
    """The rank of the step, by default a sixteenth of the model's width."""
    return math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)


def causal_convolution(channels: int, width: int, bias: bool = True) -> nn.Conv1d:
    """A depthwise convolution that sees `width` steps; its first outputs are those of a causal one."""
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The causal-conv1d package's function: x (batch, channels, length), weight (channels, width)."""
    width = weight.shape[-1]
    out = F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
    return out if activation is None else F.silu(out)


def gated_norm(
    y: Tensor,
    weight: Tensor,
    eps: float,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Root-mean-square norm within groups of channels, with the gate before or after it."""
    y = y if z is None or norm_before_gate else y * F.silu(z)
    grouped = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    y = (grouped * (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight
    return y * F.silu(z) if z is not None and norm_before_gate else y


class RMSNormGated(nn.Module):
    """Names of mamba-ssm's gated norm; it holds no size but that of its weight."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return gated_norm(x, self.weight, self.eps, z, self.group_size, self.norm_before_gate)
