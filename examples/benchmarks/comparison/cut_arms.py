"""An arm of the benchmarks of single cuts: settings of the package, or another order in which states are kept."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

from small_training import Training
from state_orders import Order, by_scores, kept_in_order
from torch import Tensor, nn

from hf_compressm import CompressionResult, CompreSSMConfig, compress
from hf_compressm.families import find_layers
from hf_compressm.families.moments import RecurrenceStatistics
from hf_compressm.models import own_class


Scores = Callable[[nn.Module, Sequence[Mapping[str, Tensor]]], Mapping[str, Tensor]]
"""Scores of the states of a model, from batches: by the name of the layer, `(groups, N)`, larger is more wanted."""


@dataclass(frozen=True, eq=False)
class Arm:
    """A way to cut.

    Attributes:
        name: in tables.
        settings: of `CompreSSMConfig`, but for the size.
        order: in which states are kept, from the measurement of a layer, where it is not the package's.
        scores: by which states are kept, from the whole model before it is cut; in place of `order`.
        sampled_tokens: of each batch, whose B and C the order sees.
        statistics: that the order is taken from, where they are not the package's.
        further: whether a benchmark trains on, or cuts during the training, with it.
        shared: whether layers have so many states on average, each as many as it needs.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    order: Order | None = None
    scores: Scores | None = None
    sampled_tokens: int = 0
    statistics: type[RecurrenceStatistics] | None = None
    further: bool = False
    shared: bool = False


def lacking(arm: Arm, model: nn.Module) -> str:
    """What the installed package lacks for an arm, or ""; a setting of 0 that it does not know is off anyway."""
    unknown = [name for name, value in arm.settings.items() if value and name not in _known()]
    if unknown:
        return f"there is no setting {', '.join(unknown)}"
    if arm.settings.get("compat") == "best" and own_class(type(model)) is None:
        return f"the package has no class for {type(model).__name__}"
    return ""


def cut(training: Training, arm: Arm, size: int, batches: int) -> CompressionResult:
    """Cut a model by an arm, and carry its moments over.

    Args:
        training: whose model is cut.
        arm: the way.
        size: states of every layer, or of a layer on average.
        batches: of calibration.

    Returns:
        The result; its seconds are those of all that the arm does, from ranking to the last fit.

    Raises:
        ValueError: if a layer was not cut.
    """
    settings = {name: value for name, value in arm.settings.items() if name in _known()}
    present = [layer.state_size for layer in find_layers(training.model)]
    rule = {"budget": size * len(present) / sum(present)} if arm.shared else {"target_state_size": size}
    config, data = CompreSSMConfig(**rule, **settings), training.calibration(batches)
    start = time.perf_counter()
    order = by_scores(arm.scores(training.model, data)) if arm.scores else arm.order
    ordered = kept_in_order(training.model, order, arm.sampled_tokens, arm.statistics) if order else nullcontext()
    with ordered:
        result = compress(training.model, config, data, optimizer=training.optimizer)
    seconds = time.perf_counter() - start
    sizes = [layer.state_size for layer in find_layers(training.model)]
    if sum(sizes) > size * len(sizes) or not (arm.shared or set(sizes) == {size}):
        raise ValueError(f"{arm.name}: the model was to be cut to {size} states.\n{result.plan}")
    return replace(result, seconds=seconds)


def _known() -> set[str]:
    return {item.name for item in fields(CompreSSMConfig)}
