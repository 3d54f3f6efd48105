"""The order in which a rival keeps a delta net's channels of queries and keys."""

import torch
from scipy.linalg import qr
from torch import Tensor

from hf_compressm.families import Measurement, SSMLayer


TOKENS = 2048
"""Of each batch, whose queries and keys the rank-revealing QR sees."""


def by_rank_revealing_qr(layer: SSMLayer, measured: Measurement) -> Tensor:
    """By a QR decomposition with column pivoting of the keys and queries of each head, one below the other.

    Keys and queries count alike, as the recurrence has them: after the L2 norm. Source: arXiv 2602.04852, which takes
    them before that norm, and goes on to swap channels until a bound of 1.5 holds: in the trained models of this
    benchmark it holds without a swap.
    """
    signals = [measured.detail.samples[name] for name in ("B", "C")]  # (tokens, key heads, N)
    stacked = torch.cat([signal / signal.norm() for signal in signals])
    pivots = [qr(head.numpy(), mode="r", pivoting=True)[1] for head in stacked.unbind(dim=1)]
    return torch.stack([torch.as_tensor(order, dtype=torch.long) for order in pivots])
