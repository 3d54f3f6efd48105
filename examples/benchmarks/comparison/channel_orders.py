"""Other orders in which a delta net's channels of queries and keys are kept: comparators of the package's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from scipy.linalg import qr
from torch import Tensor, nn

from hf_compressm.families import CutMethod, Measurement, SSMLayer, Statistics, find_layers, register
from hf_compressm.families.delta import DeltaFamily


TOKENS = 2048
"""Of each batch, whose queries and keys the rank-revealing QR sees."""
Order = Callable[[Measurement], Tensor]
"""The order of every key head's channels, `(key heads, N)`, most wanted first."""


def by_energy(measured: Measurement) -> Tensor:
    """By what each channel adds to the layer's output by itself, the diagonal of M in `families/selective.py`."""
    scores: Any = measured.scores
    return scores.argsort(dim=-1, descending=True)


def by_rank_revealing_qr(measured: Measurement) -> Tensor:
    """By a QR decomposition with column pivoting of the keys and queries of each head, one below the other.

    Keys and queries count alike, as the recurrence has them: after the L2 norm. Source: arXiv 2602.04852, which takes
    them before that norm, and goes on to swap channels until a bound of 1.5 holds: in the trained models of this
    benchmark it holds without a swap.
    """
    signals = [measured.detail.samples[name] for name in ("B", "C")]  # (tokens, key heads, N)
    stacked = torch.cat([signal / signal.norm() for signal in signals])
    pivots = [qr(head.numpy(), mode="r", pivoting=True)[1] for head in stacked.unbind(dim=1)]
    return torch.stack([torch.as_tensor(order, dtype=torch.long) for order in pivots])


@dataclass(frozen=True)
class OrderedFamily(DeltaFamily):
    """Delta nets whose channels are kept in another order.

    Attributes:
        order: of the channels.
    """

    order: Order = by_energy

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """As usual, with the other order."""
        measured = super().measure(layer, method, statistics)
        if measured.problem:
            return measured
        return replace(measured, detail=replace(measured.detail, orders=self.order(measured)))


@contextmanager
def kept_in_order(model: nn.Module, order: Order) -> Iterator[None]:
    """Cut the delta nets of a model in another order inside.

    Raises:
        ValueError: for a model with other layers.
    """
    families = {layer.family for layer in find_layers(model)}
    others = [family.name for family in families if not isinstance(family, DeltaFamily)]
    if others:
        raise ValueError(f"These orders are for delta nets; this model has layers of {others[0]}.")
    try:
        for family in families:
            same = {item.name: getattr(family, item.name) for item in fields(family)}
            register(OrderedFamily(**{**same, "sampled_tokens": TOKENS}, order=order))
        yield
    finally:
        for family in families:
            register(family)
