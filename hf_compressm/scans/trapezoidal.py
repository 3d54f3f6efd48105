"""The recurrence of Mamba-3 layers with one input per head (SISO), as far as measuring them takes it.

    h_t = alpha_t h_{t-1} + alpha_t DT_t (1 - lambda_t) v_{t-1} k_{t-1}^T + DT_t lambda_t v_t k_t^T       y_t = h_t q_t

| symbol | meaning | shape |
|---|---|---|
| alpha | decay of the state, `exp(ADT)` | `(batch, heads, length)` |
| lambda | weight of the present input, the sigmoid of a projection | `(batch, heads, length)` |
| v | input | `(batch, length, heads, head_dim)` |
| k, q | input and read-out vectors after bias and rotation | `(batch, length, heads, N)` |
| theta | angle of a pair of states, the sum of `pi tanh(angle) DT` up to now | `(batch, length, heads, angles)` |
| h | state | `(batch, heads, head_dim, N)` |

States 2i and 2i + 1 are a pair; the first pairs turn, the others do not. Source: *Mamba-3* (arXiv 2603.15569), and
mamba-ssm's `mamba3_siso_combined`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def rotated(vectors: Tensor, bias: Tensor, angles: Tensor, DT: Tensor) -> Tensor:
    """The vectors of every head, with its bias, turned by the angles so far, `(batch, length, heads, N)`.

    Args:
        vectors: B or C after its norm, `(batch, length, groups, N)`.
        bias: `(heads, N)`.
        angles: before tanh, `(batch, length, heads, angles)`.
        DT: step sizes, `(batch, heads, length)`.
    """
    theta = (torch.pi * torch.tanh(angles) * DT.mT[..., None]).cumsum(dim=1)
    own = vectors.repeat_interleave(bias.shape[0] // vectors.shape[2], dim=2) + bias
    pairs = own.unflatten(-1, (-1, 2))
    theta = F.pad(theta, (0, pairs.shape[-2] - theta.shape[-1]))
    one, other = pairs.unbind(-1)
    cos, sin = theta.cos(), theta.sin()
    return torch.stack([cos * one - sin * other, sin * one + cos * other], dim=-1).flatten(-2)


def trapezoidal_states(
    v: Tensor, k: Tensor, ADT: Tensor, DT: Tensor, trap: Tensor, every: int = 1
) -> Iterator[Tensor]:
    """Yield the states after every so many steps, one at a time, `(1, batch, heads, head_dim, N)`, without gradients.

    Args:
        v: input, `(batch, length, heads, head_dim)`.
        k: input vectors, rotated, `(batch, length, heads, N)`.
        ADT: logarithm of the decay, `(batch, heads, length)`.
        DT: step sizes, `(batch, heads, length)`.
        trap: lambda before its sigmoid, `(batch, heads, length)`.
        every: yield only the states after every `every`-th step.
    """
    with torch.no_grad():
        alpha, weight = ADT.exp(), torch.sigmoid(trap)
        now, before = DT * weight, alpha * DT * (1 - weight)
        state, last = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1]), None
        for step in range(v.shape[1]):
            push = v[:, step, :, :, None] * k[:, step, :, None, :]
            state = alpha[..., step, None, None] * state + now[..., step, None, None] * push
            if last is not None:
                state += before[..., step, None, None] * last
            last = push
            if (step + 1) % every == 0:
                yield state[None].clone()
