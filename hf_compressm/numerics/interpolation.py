"""Selecting states of a selective layer (Mamba), and reading the dropped ones out of the kept ones.

| symbol | meaning | shape |
|---|---|---|
| P | covariance of the states, `E[g^2 h h^T]`, g the loudness of the channel at the layer's output | `(N, N)` |
| Q | covariance of the read-out, `E[C_t C_t^T]` | `(N, N)` |
| S | kept state indices | `(r,)` |
| R | interpolation, `h ~ R h_S`, `R = P[:, S] P[S, S]^{-1}`: least squares on the kept states | `(N, r)` |

Discrete time, statistics over tokens and channels. If read-out and state are independent, `tr(Q P)` is the mean
square output and `tr(Q (P - P[:, S] P[S, S]^{-1} P[S, :]))` is what is lost after the repair `C_S <- R^T C`.
A selected diagonal state evolves exactly as before, so only its read-out needs the repair.
"""

import torch
from torch import Tensor

from hf_compressm.numerics.balancing import factor


PIVOT_TOLERANCE = 1e-10
"""A state whose residual variance is below this share of its own is a combination of the kept ones."""


def empirical_hankel_singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """`sqrt(eig(P Q))` of two measured covariances by the square-root method, float64 `(..., N)`, descending."""
    return torch.linalg.svdvals(factor(Q.double()).mT @ factor(P.double()))


def pivoted_selection(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy order of the states: each pivot lowers `tr(Q (P - P_S P_SS^{-1} P_S^T))` most.

    A pivoted Cholesky factorisation of P whose pivots are weighed by Q; O(N^3) for the whole order.

    Args:
        P: `(N, N)`, symmetric positive semidefinite.
        Q: `(N, N)`, likewise.

    Returns:
        The order, int64 `(N,)`, and the predicted relative output error after keeping the first k states,
        `sqrt(tr(Q (P - ...)) / tr(Q P))`, float64 `(N + 1,)`, for k = 0 .. N.
    """
    residual, weighted = P.double().clone(), Q.double() @ P.double()
    size, total = residual.shape[0], weighted.trace()
    floor = PIVOT_TOLERANCE * residual.diagonal()  # per state: rescaling a state must not change its place
    energy = P.double().diagonal() * Q.double().diagonal()
    free, order, losses = torch.ones(size, dtype=torch.bool), [], [total]
    for _ in range(size):
        variance = residual.diagonal()
        gain = (residual * weighted).sum(dim=0) / variance.clamp_min(torch.finfo(variance.dtype).tiny)
        usable = free & (variance > floor)
        candidates = usable if bool(usable.any()) else free
        score = gain if bool(usable.any()) else energy
        pivot = int(torch.where(candidates, score, -torch.inf).argmax())
        if bool(usable.any()):
            column, row = residual[:, pivot].clone(), weighted[:, pivot].clone()
            residual -= torch.outer(column, column) / column[pivot]
            weighted -= torch.outer(row, column) / column[pivot]
        free[pivot] = False
        order.append(pivot)
        losses.append(weighted.trace() if free.any() else 0 * total)  # nothing is lost once every state is kept
    errors = relative_errors(torch.stack(losses))
    return torch.tensor(order), errors


def elimination_order(M: Tensor, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy order of states that are dropped without repair: the last one has the smallest loss, and so on backwards.

    Dropping the set D loses `sum_{i, j in D} M_ij` of the mean square output: what states share counts, whereas
    a ranking by the energies `M_ii` takes them one by one. O(N^2) for the whole order.

    Args:
        M: `(N, N)`, second moment of the states' contributions to the output, `E[g^2 (C_i h_i) (C_j h_j)]`.
        candidates: bool `(N, N)`, the states among which the one to go first is chosen, then the next one, and so on;
            None for all.

    Returns:
        The order, int64 `(N,)`, most wanted first, and the relative output error after keeping the first k states,
        float64 `(N + 1,)`, for k = 0 .. N, made monotone.
    """
    M = M.double()
    with_dropped = torch.zeros_like(M[0])  # sum of a state's row over the dropped ones
    dropped, order, losses = torch.zeros(M.shape[0], dtype=torch.bool), [], [torch.zeros_like(M[0, 0])]
    for turn in range(M.shape[0]):
        added = M.diagonal() + 2 * with_dropped
        excluded = dropped if candidates is None else dropped | ~candidates[turn]
        state = int(torch.where(excluded, torch.inf, added).argmin())
        dropped[state] = True
        with_dropped += M[:, state]
        order.append(state)
        losses.append(losses[-1] + added[state])
    return torch.tensor(order[::-1]), relative_errors(torch.stack(losses[::-1]))


def relative_errors(losses: Tensor) -> Tensor:
    """`sqrt(loss_k / loss_0)`, made monotone against round-off; zeros if there is no output at all; NaN stays."""
    if float(losses[0]) <= 0:
        return torch.zeros_like(losses)
    return torch.cummin((losses / losses[0]).clamp(0, 1).sqrt(), dim=0).values


def interpolation_matrix(P: Tensor, indices: Tensor) -> Tensor:
    """R `(N, r)` with `h ~ R h_S`; the rows of the kept states are exactly those of the identity.

    Args:
        P: `(N, N)` state covariance.
        indices: `(r,)` kept state indices S.
    """
    P = P.double()
    variance = P.diagonal()[indices]
    scale = torch.where(variance > 0, variance, torch.inf).rsqrt()  # invert correlations, whatever the states' units
    correlation = scale[:, None] * P[indices][:, indices] * scale
    R = (P[:, indices] * scale) @ torch.linalg.pinv(correlation, hermitian=True, rtol=PIVOT_TOLERANCE) * scale
    R[indices] = torch.eye(indices.numel(), dtype=R.dtype)
    return R


def selection_error(P: Tensor, Q: Tensor, indices: Tensor, R: Tensor | None = None) -> float:
    """Predicted relative output error of keeping `indices`, an estimate on the data and not a bound.

    Args:
        P: `(N, N)` state covariance.
        Q: `(N, N)` read-out covariance.
        indices: `(r,)` kept states.
        R: `(N, r)` interpolation folded into the read-out; None if states are dropped without repair.
    """
    P, Q = P.double(), Q.double()
    if R is None:
        R = torch.eye(P.shape[0], dtype=P.dtype)[:, indices]
    defect = torch.eye(P.shape[0], dtype=P.dtype)
    defect[:, indices] -= R
    losses = torch.stack([(Q @ P).trace(), (Q @ defect @ P @ defect.mT).trace()])
    return float(relative_errors(losses)[1])
