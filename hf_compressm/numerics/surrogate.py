"""The paper's extension to selective layers: one averaged linear time-invariant system per channel.

| symbol | meaning | shape |
|---|---|---|
| a | mean over tokens of `exp(Delta A)`, per channel and state | `(channels, N)` |
| b | mean of `Delta B` | `(channels, N)` |
| c | mean of C, shared by the channels | `(N,)` |

Discrete time. Each channel is a single-input, single-output real diagonal system. Source: arXiv 2510.02823, appendix on
selective models; kept for comparison, since averages lose what makes the layer selective.
"""

import torch
from torch import Tensor


def surrogate_hankel_singular_values(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """HSVs of every channel's averaged system, descending, summed over the channels, float64 `(N,)`."""
    a, b, c = a.double(), b.double(), c.double()  # before 1 - a^2, which cancels
    gramian_shape = 1 - a[:, :, None] * a[:, None, :]  # (channels, N, N)
    P = b[:, :, None] * b[:, None, :] / gramian_shape
    Q = c[:, None] * c[None, :] / gramian_shape
    values_P, vectors_P = torch.linalg.eigh(P)
    values_Q, vectors_Q = torch.linalg.eigh(Q)
    L_P = vectors_P * values_P.clamp_min(0).sqrt()[:, None, :]
    L_Q = vectors_Q * values_Q.clamp_min(0).sqrt()[:, None, :]
    return torch.linalg.svdvals(L_Q.mT @ L_P).sum(dim=0)


def surrogate_scores(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Importance of each state index: its own one-state HSV, `|b c| / (1 - a^2)`, summed over channels, `(N,)`."""
    return (b.double().abs() * c.double().abs() / (1 - a.double() ** 2)).sum(dim=0)
