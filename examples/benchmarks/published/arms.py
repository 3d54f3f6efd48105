"""The arms of `published_table.py`: ways to cut a trained model to a given number of states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from channel_orders import Order, by_energy
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import CutMethod, Measurement, SSMLayer, Statistics, find_layers, register
from hf_compressm.families.selective import SelectiveFamily


Batch = Mapping[str, Tensor]
Cut = Callable[[PreTrainedModel, CompreSSMConfig, Sequence[Batch]], Any]
"""Cuts a model in place to `target_state_size` of the settings, by what it sees of the batches."""


@dataclass(frozen=True)
class Arm:
    """A way to cut.

    Attributes:
        name: in keys and tables.
        settings: of `CompreSSMConfig`, but for size and seed.
        cut: what cuts; `hf_compressm.compress` unless a rival has a function of its own.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = compress


def in_order(order: Order) -> Cut:
    """A cut that keeps states in another order, without repair or refit.

    Args:
        order: of the states, `(groups, N)`, most wanted first, from the measurement of a layer.
    """

    def cut(model: PreTrainedModel, config: CompreSSMConfig, batches: Sequence[Batch]) -> Any:
        with kept_in_order(model, order):
            return compress(model, config, batches)

    return cut


@contextmanager
def kept_in_order(model: nn.Module, order: Order) -> Iterator[None]:
    """Keep the states of all selective layers of a model in another order inside.

    Raises:
        ValueError: for a model with layers that are not cut by selecting states.
    """
    families = {layer.family for layer in find_layers(model)}
    others = sorted(family.name for family in families if not isinstance(family, SelectiveFamily))
    if others:
        raise ValueError(f"An order of states is for selective layers; this model has layers of {others}.")
    try:
        for family in families:
            register(
                _ordered(type(family), order)(**{item.name: getattr(family, item.name) for item in fields(family)})
            )
        yield
    finally:
        for family in families:
            register(family)


def _ordered(kind: type[SelectiveFamily], order: Order) -> type[SelectiveFamily]:
    """A subclass of a family with another order."""

    class Ordered(kind):
        def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
            """As usual, with the other order."""
            measured = super().measure(layer, method, statistics)
            if measured.problem:
                return measured
            return replace(measured, detail=replace(measured.detail, orders=order(measured)))

    return Ordered


ARMS = (
    Arm("ours"),
    Arm("refit", {"refit_steps": 200}),
    Arm("best", {"compat": "best"}),
    Arm("random", {"keep": "random", "refit_steps": 0}),
    Arm("energy", {"refit_steps": 0}, in_order(by_energy)),
    # A rival is one more row: other settings, `in_order(its order)`, or a function of its own as `cut`.
)
