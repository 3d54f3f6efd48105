"""Balancing the states of a layer whose states share one decay, against measured covariances.

| symbol | meaning | shape |
|---|---|---|
| P | covariance of the states, weighed by their loudness at the layer's output | `(N, N)` |
| Q | covariance of the read-out, `E[C_t C_t^T]` | `(N, N)` |
| W | projection of the input vectors, `B~ = W B` | `(r, N)` |
| V | its right inverse, `C~ = V^T C`, `W V = I` | `(N, r)` |

If one decay multiplies all states alike (Mamba-2), any projection of the states commutes with the recurrence, at every
step and whatever the decays are: `h~ = W h` holds exactly. If state and read-out are independent, `sum sigma_i^2` is
the mean square output, and the projection onto the first r loses `sum_{i > r} sigma_i^2`, the least of all projections
of rank r.
"""

import torch
from torch import Tensor

from hf_compressm.numerics.balancing import factor
from hf_compressm.numerics.interpolation import relative_errors


DEAD = 1e-7
"""Square root of the round-off of the covariances: a value below this share of the largest is not measured."""


def balanced_projection(P: Tensor, Q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """W and V for some of the balanced states, by the square-root method; O(N^3).

    The rows of W have unit length, so that both matrices take training steps of one scale, whatever the units of P.
    A state without a share in the output is read out with zeros.

    Args:
        P: `(N, N)`, symmetric positive semidefinite.
        Q: `(N, N)`, likewise.
        indices: `(r,)` the balanced states that stay, 0 the strongest.

    Returns:
        W `(r, N)` and V `(N, r)`, float64.
    """
    L_P, L_Q = factor(P.double()), factor(Q.double())
    left, sigma, right = torch.linalg.svd(L_Q.mT @ L_P)
    W, V = left.mT[indices] @ L_Q.mT, L_P @ right.mT[:, indices]  # W V = diag(sigma)
    alive = sigma[indices] > DEAD * sigma[0]
    length = W.norm(dim=1)
    unit = torch.eye(P.shape[0], dtype=W.dtype)[indices]
    W = torch.where(length[:, None] > 0, W / length.clamp_min(torch.finfo(W.dtype).tiny)[:, None], unit)
    V = torch.where(alive, V * length / sigma[indices].clamp_min(torch.finfo(W.dtype).tiny), torch.zeros_like(V))
    return W, V


def projection_errors(sigma: Tensor) -> Tensor:
    """Predicted relative output error after keeping the first k balanced states, float64 `(N + 1,)`, k = 0 .. N.

    Args:
        sigma: `(N,)` empirical Hankel singular values, descending.
    """
    tails = torch.cat([sigma.double().square().flip(0).cumsum(0).flip(0), sigma.new_zeros(1, dtype=torch.float64)])
    return relative_errors(tails)
