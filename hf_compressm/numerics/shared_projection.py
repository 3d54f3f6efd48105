"""One orthonormal projection of two signals that are only seen through their inner products.

| symbol | meaning | shape |
|---|---|---|
| Q, K | second moments of queries and of keys, `E[q q^T]`, `E[k k^T]` | `(N, N)` |
| U | the projection, `U U^T = I` | `(r, N)` |
| E | what it drops, `I - U^T U` | `(N, N)` |

The delta rule sees q and k only through `q . k` and `k . k`. With independent tokens of these moments the products
`U q . U k` and `U k . U k` lose, relative to their mean squares,

    tr(E Q E K) / tr(Q K) + tr(E K E K) / tr(K K),

which is quadratic and convex in E, and is minimised over the projections of one rank.
"""

import torch
from torch import Tensor


STEPS = 50
"""Ten times as many lower the loss by less than 0.002, of 2 for nothing kept."""
ARMIJO = 1e-4
"""Share of the decrease that the slope promises, below which a step is too long."""
SMALLEST_STEP = 1e-12
"""Of a step, beyond which round-off decides."""


def shared_projection_loss(Q: Tensor, K: Tensor, U: Tensor) -> float:
    """What U loses of the products of queries and keys, and of keys and keys: 0 for all of it, 2 for none.

    Args:
        Q: `(N, N)` second moment of the queries.
        K: `(N, N)` second moment of the keys.
        U: `(r, N)`, with orthonormal rows.
    """
    Q, K = _scaled(Q, K)
    return float(_loss(Q, K, _dropped(U)))


def shared_directions(Q: Tensor, K: Tensor) -> Tensor:
    """An orthonormal basis, by how much of the products lies in each direction, `(N, N)`; O(N^3).

    These are the eigenvectors of `K^(1/2) Q K^(1/2) / tr(Q K) + K^2 / tr(K^2)`. Their first r rows are where
    `shared_projection` begins.

    Args:
        Q: `(N, N)` second moment of the queries.
        K: `(N, N)` second moment of the keys.
    """
    Q, K = _scaled(Q, K)
    values, vectors = torch.linalg.eigh(K)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return torch.linalg.eigh(root @ Q @ root + K @ K).eigenvectors.flip(1).mT


def shared_projection(Q: Tensor, K: Tensor, U: Tensor) -> Tensor:
    """A better projection of the rank of U `(r, N)`, float64; O(N^3) a step.

    Gradient steps on the Grassmann manifold, back to orthonormal rows by a QR decomposition, each as long as Armijo's
    rule allows (Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix Manifolds, sections 4.1 and 4.2).

    Args:
        Q: `(N, N)` second moment of the queries.
        K: `(N, N)` second moment of the keys.
        U: `(r, N)`, with orthonormal rows, where the search begins.
    """
    Q, K = _scaled(Q, K)
    U, length = U.double(), 1.0
    loss = _loss(Q, K, _dropped(U))
    for _ in range(STEPS):
        E = _dropped(U)
        slope = -4 * U @ (_symmetric(Q @ E @ K) + K @ E @ K) @ E
        steepness = slope.square().sum()
        while length > SMALLEST_STEP:
            trial = torch.linalg.qr((U - length * slope).mT).Q.mT
            lower = _loss(Q, K, _dropped(trial))
            if lower <= loss - ARMIJO * length * steepness:
                break
            length /= 2
        else:
            return U
        U, loss, length = trial, lower, 2 * length
    return U


def _dropped(U: Tensor) -> Tensor:
    return torch.eye(U.shape[1], dtype=torch.float64) - U.double().mT @ U.double()


def _loss(Q: Tensor, K: Tensor, E: Tensor) -> Tensor:
    """The loss, with Q and K scaled so that both denominators are 1."""
    return torch.einsum("ij,ji->", E @ Q, E @ K) + torch.einsum("ij,ji->", E @ K, E @ K)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _scaled(Q: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Q and K in units in which `tr(Q K)` and `tr(K K)` are 1; 0 without any signal."""
    Q, K = Q.double(), K.double()
    keys, products = (K * K).sum().sqrt(), (Q * K).sum()
    K = K / keys if keys > 0 else torch.zeros_like(K)
    return (Q * keys / products if products > 0 else torch.zeros_like(Q)), K
