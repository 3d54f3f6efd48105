"""Measuring a model and choosing what a cut would do to it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging

from hf_compressm.adapters import Measurement, Statistics, collect_statistics, follow
from hf_compressm.compression.plan import CompressionPlan, LayerPlan
from hf_compressm.compression.settings import LayerChoice, check_settings
from hf_compressm.compression.threads import for_each
from hf_compressm.config import CompreSSMConfig
from hf_compressm.numerics.ranks import count_by_error, count_by_tolerance, passes_gate, round_size
from hf_compressm.processes import ALONE, Processes, checksum


logger = logging.get_logger(__name__)

T = TypeVar("T")


def plan_compression(
    model: nn.Module,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    reduction_share: float = 1.0,
    processes: Processes = ALONE,
) -> CompressionPlan:
    """Measure, choose sizes and work out every new tensor, without touching the model.

    Args:
        model: any module with SSM layers of a known family.
        config: settings.
        calibration: iterable of model-input dicts, needed by selective layers and by `criterion="empirical"`.
        reduction_share: share of the states that the rank rule would drop which this cut drops; below 1 it is gentler.
        processes: those that train the model together and call this together, each with calibration batches of its
            own, or none but for the first; what they see is added up, and the plan of the first is that of all.

    Raises:
        ValueError: for a model without SSM layers, settings that do not fit it, missing calibration or a batch that
            the model rejects; for NaN or Inf only under `on_nonfinite="raise"`.
    """

    def plan(choices: list[LayerChoice], measurements: list[Measurement]) -> CompressionPlan:
        tell_problems(choices, measurements, config)
        return plan_sizes(choices, measurements, config, reduction_share)

    return from_measurements(plan, model, config, calibration, processes)


def plan_sizes(
    choices: Sequence[LayerChoice],
    measurements: Sequence[Measurement],
    config: CompreSSMConfig,
    reduction_share: float = 1.0,
) -> CompressionPlan:
    """The sizes that the rank rule gives to measured layers, and every new tensor."""
    sizes = _choose_sizes(choices, measurements, config, reduction_share)
    plans = for_each(lambda parts: _plan_layer(*parts), zip(choices, measurements, sizes, strict=True))
    return CompressionPlan(tuple(_one_size_or_none(choices, plans)))


def from_measurements(
    work: Callable[[list[LayerChoice], list[Measurement]], T],
    model: nn.Module,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None,
    processes: Processes = ALONE,
) -> T:
    """What `work` makes of the layers that the settings pick and of what each shows; touches nothing.

    Args:
        work: done by the first process alone; every process gets its result.
        model: any module with SSM layers of a known family.
        config: settings.
        calibration: as for `plan_compression`.
        processes: likewise.

    Raises:
        ValueError: as `plan_compression`, but for NaN and Inf; and what the work raises.
    """
    with processes.together():
        choices = check_settings(model, config, calibrated=calibration is not None)
        layers, criteria = [choice.layer for choice in choices], [choice.method.criterion for choice in choices]
        statistics = collect_statistics(model, layers, criteria, calibration, not processes.is_first)
    _add_up([item for item in statistics if item is not None], model, processes)

    def measured() -> T:
        return work(choices, for_each(lambda pair: _measure(*pair), zip(choices, statistics, strict=True)))

    return processes.first(measured, model)


def _measure(choice: LayerChoice, seen: Statistics | None) -> Measurement:
    return choice.layer.adapter.measure(choice.layer, choice.method, seen)


def _add_up(statistics: Sequence[Statistics], model: nn.Module, processes: Processes) -> None:
    """Add to the first process's statistics what the others have seen."""
    if processes.size == 1 or not statistics:
        return
    tokens = [torch.tensor(float(item.tokens), dtype=torch.float64) for item in statistics]
    sums = [{**item.sums, "tokens": count} for item, count in zip(statistics, tokens, strict=True)]
    added = processes.add_up(sums, next(model.parameters()).device)
    samples = processes.gather([item.samples for item in statistics])
    for number, (item, total) in enumerate(zip(statistics, added, strict=True)):
        item.tokens = int(total.pop("tokens"))
        item.sums = total
        every = [seen[number] for seen in samples]
        item.samples = {name: [rows for seen in every for rows in seen.get(name, ())] for name in every[0]}


def tell_problems(
    choices: Sequence[LayerChoice], measurements: Sequence[Measurement], config: CompreSSMConfig
) -> None:
    """Warn of layers that cannot be cut.

    Raises:
        ValueError: for NaN or Inf under `on_nonfinite="raise"`.
    """
    for choice, measurement in zip(choices, measurements, strict=True):
        layer = choice.layer
        if not measurement.problem:
            continue
        if config.on_nonfinite == "raise" and "non-finite" in measurement.problem:
            raise ValueError(
                f"{layer.name} has {measurement.problem}. Go back to an earlier checkpoint, or pass "
                "on_nonfinite='skip' to leave such layers alone."
            )
        logger.warning(f"{layer.name} is not cut: {measurement.problem}.")


def _choose_sizes(
    choices: Sequence[LayerChoice],
    measurements: Sequence[Measurement],
    config: CompreSSMConfig,
    reduction_share: float,
) -> list[int]:
    """New state size of every layer, by the rank rule; layers of a family with one size share the largest."""
    wanted = for_each(lambda parts: _wanted_size(*parts, config), zip(choices, measurements, strict=True))
    if reduction_share < 1:
        wanted = [_gentler(*parts, config, reduction_share) for parts in zip(choices, wanted, strict=True)]
    for family in {choice.layer.adapter.family for choice in choices if not choice.per_layer}:
        members = [i for i, choice in enumerate(choices) if choice.layer.adapter.family == family]
        largest = max(wanted[i] for i in members)
        for i in members:
            wanted[i] = min(largest, choices[i].layer.state_size)
    gated = config.rank_rule in ("tolerance", "max_error")
    present = [choice.layer.state_size for choice in choices]
    return [
        size if not gated or passes_gate(before, size, config.min_reduction) else before
        for before, size in zip(present, wanted, strict=True)
    ]


def _wanted_size(choice: LayerChoice, measurement: Measurement, config: CompreSSMConfig) -> int:
    layer, size = choice.layer, choice.layer.state_size
    if measurement.problem:
        return size
    sigma = measurement.hankel_singular_values
    count = 0
    if config.tolerance is not None:
        count = count_by_tolerance(sigma, config.tolerance)
        wanted = count * size / sigma.numel()
    elif config.max_error is not None:
        count = count_by_error(measurement.errors, config.max_error)
        wanted = count * size / sigma.numel()
    elif config.fraction is not None:
        wanted = int(size * (1 - config.fraction) + 1e-9)
    else:
        wanted = min(config.target_state_size or size, size)
    multiple = math.lcm(config.round_to, layer.adapter.granularity(layer.module))
    new_size = round_size(wanted, size, multiple, config.min_state_size)
    while count and new_size < size and layer.adapter.values_kept(layer, choice.method, measurement, new_size) < count:
        new_size = round_size(new_size + 1, size, multiple, config.min_state_size)
    return new_size


def _gentler(choice: LayerChoice, wanted: int, config: CompreSSMConfig, reduction_share: float) -> int:
    """A size that takes only a share of the reduction."""
    layer, size = choice.layer, choice.layer.state_size
    multiple = math.lcm(config.round_to, layer.adapter.granularity(layer.module))
    return round_size(size - reduction_share * (size - wanted), size, multiple, config.min_state_size)


def _plan_layer(choice: LayerChoice, measurement: Measurement, size: int) -> LayerPlan:
    layer, method = choice.layer, choice.method
    plan = LayerPlan(
        name=layer.name,
        family=layer.adapter.family,
        state_size=layer.state_size,
        new_state_size=layer.state_size,
        hankel_singular_values=measurement.hankel_singular_values,
        energy_kept=1.0,
        predicted_error=0.0,
        error_bound=None,
        status="skipped" if measurement.problem else "kept",
        reason=measurement.problem or "the rule and the gate leave nothing worth cutting",
        criterion=method.criterion,
    )
    if measurement.problem or size >= layer.state_size:
        return plan
    try:
        cut = follow(layer, layer.adapter.cut(layer, method, measurement, size))
    except (ValueError, torch.linalg.LinAlgError) as error:
        logger.warning(f"{layer.name} is not cut: {error}")
        return replace(plan, status="skipped", reason=str(error))
    return replace(
        plan,
        new_state_size=size,
        energy_kept=cut.energy_kept,
        predicted_error=cut.predicted_error,
        error_bound=cut.error_bound,
        status="cut",
        reason=cut.note,
        layer=layer,
        cut=cut,
        fingerprints=tuple(checksum(change.parameter) for change in cut.changes),
    )


def _one_size_or_none(choices: Sequence[LayerChoice], plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Where all layers of a family share one size, a layer that cannot be cut keeps the others from it too."""
    stuck = {
        plan.family: plan.name
        for choice, plan in zip(choices, plans, strict=True)
        if plan.status == "skipped" and not choice.per_layer
    }
    return [
        _kept(plan, f"{stuck[plan.family]} cannot be cut, and all layers share one size")
        if plan.status == "cut" and plan.family in stuck
        else plan
        for plan in plans
    ]


def _kept(plan: LayerPlan, reason: str) -> LayerPlan:
    """The plan of a layer that stays as it is."""
    return replace(
        plan,
        new_state_size=plan.state_size,
        energy_kept=1.0,
        predicted_error=0.0,
        error_bound=None,
        status="kept",
        reason=reason,
        layer=None,
        cut=None,
        fingerprints=(),
    )
