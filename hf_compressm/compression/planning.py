"""Choosing the sizes that a cut gives to measured layers, and computing every new tensor."""

import functools
import operator
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_compressm.compression.choices import LayerChoice
from hf_compressm.compression.measuring import from_measurements, judged
from hf_compressm.compression.plan import CompressionPlan, LayerPlan
from hf_compressm.compression.request import CutRequest
from hf_compressm.compression.sizes import sizes_of, why_kept
from hf_compressm.config import CompreSSMConfig, Settings, as_config
from hf_compressm.families import Measurement
from hf_compressm.families.gradients import LossChange
from hf_compressm.families.refit import tried
from hf_compressm.families.running import measured_error
from hf_compressm.numerics.ranks import count_by_error, count_by_tolerance, passes_gate, round_size
from hf_compressm.surgery.lora import follow
from hf_compressm.utils.processes import ALONE, Processes, checksum
from hf_compressm.utils.threads import for_each


logger = logging.get_logger(__name__)


def plan_compression(
    model: nn.Module,
    config: Settings,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    reduction_share: float = 1.0,
    processes: Processes = ALONE,
) -> CompressionPlan:
    """Measure, choose sizes and compute every new tensor, without changing the model.

    Args:
        model: any module with SSM layers of a known family.
        config: settings, as in `analyze`.
        calibration: iterable of model-input dicts, needed by selective layers and by `criterion="empirical"`.
        reduction_share: share of the rank rule's reduction that this cut makes; below 1 it drops fewer states.
        processes: the processes that train the model and call this together, each with its own calibration batches;
            only the first must have some. Their statistics are added up, and all use the plan of the first.

    Raises:
        ValueError: for a model without SSM layers, settings that do not fit it, missing calibration or a batch that
            the model rejects; for NaN or Inf only under `on_nonfinite="raise"`.
    """
    request = CutRequest(as_config(config), calibration, reduction_share=reduction_share, processes=processes)
    return plan_cut(model, request)


def plan_cut(model: nn.Module, request: CutRequest) -> CompressionPlan:
    """Plan a cut as `plan_compression` does, with the arguments in a request."""

    def plan(choices: list[LayerChoice], measurements: list[Measurement]) -> CompressionPlan:
        measurements = judged(choices, measurements, request.config)
        return plan_sizes(choices, measurements, request.config, request.reduction_share)

    return from_measurements(plan, model, request)


def plan_sizes(
    choices: Sequence[LayerChoice],
    measurements: Sequence[Measurement],
    config: CompreSSMConfig,
    reduction_share: float = 1.0,
) -> CompressionPlan:
    """The sizes that the rank rule gives to measured layers, and every new tensor."""
    sizes = _choose_sizes(choices, measurements, config, reduction_share)
    plans = for_each(lambda parts: _plan_layer(*parts, config), zip(choices, measurements, sizes, strict=True))
    plans = _one_size_or_none(choices, plans)
    return CompressionPlan(tuple(plans), _together([plan.cut.loss_change for plan in plans if plan.cut is not None]))


def _together(changes: Sequence[LossChange | None]) -> LossChange | None:
    """What the cuts of several layers do to the loss; None where that is not known, or not on the same rows."""
    known = [change for change in changes if change is not None]
    if not known or len(known) < len(changes) or len({change.terms.shape for change in known}) > 1:
        return None
    return functools.reduce(operator.add, known)


def _choose_sizes(
    choices: Sequence[LayerChoice],
    measurements: Sequence[Measurement],
    config: CompreSSMConfig,
    reduction_share: float,
) -> list[int]:
    """New state size of every layer, by the rank rule; layers that have one size together share the largest."""
    wanted = for_each(lambda parts: _wanted_size(*parts, config), zip(choices, measurements, strict=True))
    if reduction_share < 1:
        wanted = [_gentler(*parts, config, reduction_share) for parts in zip(choices, wanted, strict=True)]
    for group in {choice.group for choice in choices}:
        members = [i for i, choice in enumerate(choices) if choice.group == group]
        largest = max(wanted[i] for i in members)
        for i in members:
            wanted[i] = round_size(largest, sizes_of(choices[i].layer, config))
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
    error = _allowed_error(config)
    if layer.family.reruns and measurement.examples and error is not None:
        return _size_by_running(choice, measurement, error, config)
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
    allowed = sizes_of(layer, config)
    new_size = round_size(wanted, allowed)
    while count and new_size < size and layer.family.values_kept(layer, choice.method, measurement, new_size) < count:
        new_size = round_size(new_size + 1, allowed)
    return new_size


def _allowed_error(config: CompreSSMConfig) -> float | None:
    """The largest relative error of a layer's output that the rank rule allows, None for rules that name a size.

    Of a layer whose cuts are tried, `tolerance` is the share of the output's energy that may be lost.
    """
    return config.max_error if config.tolerance is None else config.tolerance**0.5


def _size_by_running(choice: LayerChoice, measurement: Measurement, allowed: float, config: CompreSSMConfig) -> int:
    """The smallest size at which the cut layer, run on its examples, is within the allowed error; by bisection."""
    layer, size = choice.layer, choice.layer.state_size
    sizes = sizes_of(layer, config)

    def is_enough(candidate: int) -> bool:
        if candidate >= size:
            return True
        cut = layer.family.cut(layer, choice.method, measurement, candidate)
        return measured_error(layer, cut, measurement.examples) <= allowed

    return sizes[bisect_left(sizes, True, key=is_enough)]


def _gentler(choice: LayerChoice, wanted: int, config: CompreSSMConfig, reduction_share: float) -> int:
    """The size after only a share of the reduction."""
    size = choice.layer.state_size
    return round_size(size - reduction_share * (size - wanted), sizes_of(choice.layer, config))


def _plan_layer(choice: LayerChoice, measurement: Measurement, size: int, config: CompreSSMConfig) -> LayerPlan:
    layer, method = choice.layer, choice.method
    plan = LayerPlan(
        name=layer.name,
        family=layer.family.name,
        state_size=layer.state_size,
        new_state_size=layer.state_size,
        hankel_singular_values=measurement.hankel_singular_values,
        energy_kept=1.0,
        predicted_error=0.0,
        error_bound=None,
        status="skipped" if measurement.problem else "kept",
        reason=measurement.problem or why_kept(layer, config),
        criterion=method.criterion,
        state_bytes=(layer.state_bytes(layer.state_size), layer.state_bytes(layer.state_size)),
    )
    if measurement.problem or size >= layer.state_size:
        return plan
    try:
        cut = follow(layer, layer.family.cut(layer, method, measurement, size))
        if measurement.examples:
            cut = tried(layer, cut, measurement.examples, method.refit_steps)
    except (ValueError, torch.linalg.LinAlgError) as error:
        logger.warning(f"{layer.name} is not cut: {error}")
        return replace(plan, status="skipped", reason=str(error))
    return replace(
        plan,
        new_state_size=size,
        energy_kept=cut.energy_kept,
        predicted_error=cut.predicted_error,
        predicted_loss_change=None if cut.loss_change is None else cut.loss_change.value,
        error_bound=cut.error_bound,
        status="cut",
        state_bytes=(layer.state_bytes(layer.state_size), layer.state_bytes(size)),
        reason=cut.note,
        layer=replace(layer, owner=None),  # plans travel between processes, and each has the configuration
        cut=cut,
        fingerprints=tuple(checksum(change.parameter) for change in cut.changes),
    )


def _one_size_or_none(choices: Sequence[LayerChoice], plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plans; of layers that have one size together, none is cut if one of them cannot be cut."""
    stuck = {choice.group: plan.name for choice, plan in zip(choices, plans, strict=True) if plan.status == "skipped"}
    return [
        _kept(plan, f"{stuck[choice.group]} cannot be cut, and all layers share one size")
        if plan.status == "cut" and choice.group in stuck
        else plan
        for choice, plan in zip(choices, plans, strict=True)
    ]


def _kept(plan: LayerPlan, reason: str) -> LayerPlan:
    """The plan of a layer that stays as it is."""
    return plan.unchanged(
        energy_kept=1.0,
        predicted_error=0.0,
        predicted_loss_change=None,
        error_bound=None,
        status="kept",
        reason=reason,
        layer=None,
        cut=None,
        fingerprints=(),
    )
