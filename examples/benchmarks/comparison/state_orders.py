"""Other orders in which the states of selective layers are kept: comparators of the package's own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families import CutMethod, Measurement, SSMLayer, Statistics, find_layers, register
from hf_compressm.families.calls import Call
from hf_compressm.families.moments import CovarianceStatistics, RecurrenceStatistics
from hf_compressm.families.selective import SelectiveFamily


Order = Callable[[SSMLayer, Measurement], Tensor]
"""The order of every group's states, `(groups, N)`, most wanted first."""


def by_energy(layer: SSMLayer, measured: Measurement) -> Tensor:
    """By what each state adds to the layer's output by itself, the diagonal of M in `families/selective.py`."""
    return measured.scores.argsort(dim=-1, descending=True)


def by_scores(scores: Mapping[str, Tensor]) -> Order:
    """By scores that were computed before, by the name of the layer, `(groups, N)`; the largest first."""
    return lambda layer, measured: scores[layer.name].argsort(dim=-1, descending=True, stable=True)


class UnweightedStatistics(CovarianceStatistics):
    """The same sums with channels that are all as loud: what a state adds to the recurrence's own output."""

    def sums_of(self, call: Call, mask: Tensor | None) -> dict[str, Tensor]:
        """As usual, with a gain of 1."""
        return super().sums_of(replace(call, gain=torch.ones_like(call.output)), mask)


@contextmanager
def kept_in_order(
    model: nn.Module, order: Order, sampled_tokens: int = 0, statistics: type[RecurrenceStatistics] | None = None
) -> Iterator[None]:
    """Keep the states of all selective layers of a model in another order inside.

    Args:
        model: any module.
        order: of the states.
        sampled_tokens: of each batch, whose B and C the order finds in `measured.detail.samples`.
        statistics: what is measured of a layer; the package's own by default.

    Raises:
        ValueError: for a model with layers that are not cut by selecting states.
    """
    families = {layer.family for layer in find_layers(model)}
    others = sorted(family.name for family in families if not isinstance(family, SelectiveFamily))
    if others:
        raise ValueError(f"An order of states is for selective layers; this model has layers of {others}.")
    try:
        for family in families:
            same = {item.name: getattr(family, item.name) for item in fields(family)}
            sampled: dict[str, Any] = {"sampled_tokens": sampled_tokens} if sampled_tokens else {}
            register(_ordered(type(family), order, statistics)(**same | sampled))
        yield
    finally:
        for family in families:
            register(family)


def _ordered(
    kind: type[SelectiveFamily], order: Order, own: type[RecurrenceStatistics] | None
) -> type[SelectiveFamily]:
    """A subclass of a family with another order."""

    class Ordered(kind):
        def statistics(self, module: Any, criterion: str) -> Statistics | None:
            """Those that the order needs."""
            return own(self, module) if own else super().statistics(module, criterion)

        def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
            """As usual, with the other order."""
            measured = super().measure(layer, method, statistics)
            if measured.problem:
                return measured
            return replace(measured, detail=replace(measured.detail, orders=order(layer, measured), for_fit=None))

    return Ordered
