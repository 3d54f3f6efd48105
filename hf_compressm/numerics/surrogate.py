"""The paper's extension to selective layers: one averaged linear time-invariant system per channel.

| symbol | meaning | shape |
|---|---|---|
| a | mean over tokens of `exp(Delta A)`, per channel and state | `(channels, N)` |
| b | mean of `Delta B` | `(channels, N)` |
| c | mean of C, shared by the channels | `(N,)` |

Discrete time. Each channel is a single-input, single-output real diagonal system. Source: arXiv 2510.02823, appendix
on selective models; kept for comparison, since averages lose what makes the layer selective.
"""

import torch
from torch import Tensor

from hf_compressm.numerics.balancing import factor


def surrogate_gramians(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Closed-form Gramians of every channel's averaged system, float64 `(channels, N, N)` each."""
    a, b, c = a.double(), b.double(), c.double()
    denominator = 1 - a[:, :, None] * a[:, None, :]
    return b[:, :, None] * b[:, None, :] / denominator, c[:, None] * c[None, :] / denominator


def surrogate_hankel_singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """HSVs of every channel's averaged system, descending, summed over the channels, float64 `(N,)`."""
    return torch.linalg.svdvals(factor(Q).mT @ factor(P)).sum(dim=0)


def surrogate_scores(P: Tensor, Q: Tensor) -> Tensor:
    """Importance of each state index: the HSV of its own one-state system, summed over channels, `(N,)`."""
    return (P.diagonal(dim1=1, dim2=2) * Q.diagonal(dim1=1, dim2=2)).clamp_min(0).sqrt().sum(dim=0)


def surrogate_losses(P: Tensor, Q: Tensor, order: Tensor) -> Tensor:
    """Output energy of the averaged systems lost by keeping the first k states of `order`, `(N + 1,)`.

    With D the projection on the dropped states, `sum over channels of tr(Q D P D)`.
    """
    shared = (P * Q).sum(dim=0)[order][:, order]  # (N, N)
    corners = shared.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([corners, corners.new_zeros(1)])
