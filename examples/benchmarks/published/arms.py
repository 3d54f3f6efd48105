"""The arms of `published_table.py`: ways to cut a trained model to a given number of states."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from state_orders import Order, by_energy, kept_in_order
from torch import Tensor
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, compress


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
            return compress(model, replace(config, refit_steps=0), batches)

    return cut


ARMS = (
    Arm("ours"),
    Arm("without a refit", {"refit_steps": 0}),
    Arm("refit", {"refit_steps": 200}),
    Arm("best", {"compat": "best"}),
    Arm("random", {"keep": "random", "refit_steps": 0}),
    Arm("energy", {}, in_order(by_energy)),
    # A rival is one more row: other settings, `in_order(its order)`, or a function of its own as `cut`.
)
