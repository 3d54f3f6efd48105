"""Measuring a model and choosing what a cut would do to it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_compressm.adapters import CutMethod, Measurement, SSMLayer, collect_statistics, find_layers
from hf_compressm.compression.plan import CompressionPlan, LayerPlan, fingerprint
from hf_compressm.config import CompreSSMConfig
from hf_compressm.numerics.ranks import count_by_error, count_by_tolerance, passes_gate, round_size


logger = logging.get_logger(__name__)


def plan_compression(
    model: nn.Module, config: CompreSSMConfig, calibration: Iterable[Mapping[str, Any]] | None = None
) -> CompressionPlan:
    """Measure, choose sizes and work out every new tensor, without touching the model.

    Args:
        model: any module with SSM layers of a known family.
        config: settings.
        calibration: iterable of model-input dicts, needed by selective layers and by `criterion="empirical"`.

    Raises:
        ValueError: for a model without SSM layers, settings that do not fit it, missing calibration or a batch that
            the model rejects; for NaN or Inf only under `on_nonfinite="raise"`.
    """
    layers, criteria = check_settings(model, config, calibrated=calibration is not None)
    methods = [CutMethod(name, config.keep, config.realization, config.sampling_seed) for name in criteria]
    statistics = collect_statistics(model, layers, criteria, calibration)
    measurements = [
        layer.adapter.measure(layer, method, seen)
        for layer, method, seen in zip(layers, methods, statistics, strict=True)
    ]
    _raise_on_problems(layers, measurements, config)
    sizes = _choose_sizes(layers, methods, measurements, config)
    plans = [_plan_layer(*parts) for parts in zip(layers, methods, measurements, sizes, strict=True)]
    return CompressionPlan(tuple(_one_size_or_none(layers, plans, config)))


def check_settings(model: nn.Module, config: CompreSSMConfig, calibrated: bool) -> tuple[list[SSMLayer], list[str]]:
    """The layers that the settings pick and the criterion of each.

    Args:
        model: any module.
        config: settings.
        calibrated: whether calibration data will be there.

    Raises:
        ValueError: for a model without SSM layers, or settings that do not fit it.
    """
    layers = _chosen_layers(model, config)
    _check_against_model(layers, config)
    return layers, [layer.adapter.criterion(config.criterion, calibrated, config.realization) for layer in layers]


def _chosen_layers(model: nn.Module, config: CompreSSMConfig) -> list[SSMLayer]:
    """Layers that `layers` and `ignore_layers` leave."""
    found = find_layers(model)
    chosen = [
        layer
        for layer in found
        if (config.layers is None or _matches(layer.name, config.layers))
        and not _matches(layer.name, config.ignore_layers or [])
    ]
    if not chosen:
        names = ", ".join(layer.name for layer in found)
        raise ValueError(
            f"layers={config.layers} and ignore_layers={config.ignore_layers} leave no layer; there are {names}."
        )
    for layer in found:
        if layer not in chosen:
            logger.info(f"{layer.name} is left alone (layers / ignore_layers).")
    uniform = [layer for layer in chosen if not _per_layer(layer, config)]
    if uniform and len(chosen) < len(found):
        raise ValueError(
            f"layers / ignore_layers pick {len(chosen)} of {len(found)} layers, but these {uniform[0].adapter.family} "
            "models have one state size for all. Drop layers / ignore_layers, or use per_layer=True where it applies."
        )
    return chosen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) or name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _check_against_model(layers: Sequence[SSMLayer], config: CompreSSMConfig) -> None:
    largest = max(layer.state_size for layer in layers)
    if config.target_state_size is not None and config.target_state_size > largest:
        raise ValueError(
            f"target_state_size={config.target_state_size} is above the present state size {largest}; "
            f"choose a whole number from 1 to {largest}."
        )
    for layer in layers:
        if config.per_layer and not layer.adapter.per_layer:
            raise ValueError(
                f"per_layer=True needs a model class with a size per layer; the class of {layer.name} "
                f"({layer.adapter.family}) has a single {layer.adapter.size_field}. Use per_layer=False."
            )


def _per_layer(layer: SSMLayer, config: CompreSSMConfig) -> bool:
    return layer.adapter.per_layer if config.per_layer is None else config.per_layer


def _raise_on_problems(
    layers: Sequence[SSMLayer], measurements: Sequence[Measurement], config: CompreSSMConfig
) -> None:
    for layer, measurement in zip(layers, measurements, strict=True):
        if not measurement.problem:
            continue
        if config.on_nonfinite == "raise" and "non-finite" in measurement.problem:
            raise ValueError(
                f"{layer.name} has {measurement.problem}. Go back to an earlier checkpoint, or pass "
                "on_nonfinite='skip' to leave such layers alone."
            )
        logger.warning(f"{layer.name} is not cut: {measurement.problem}.")


def _choose_sizes(
    layers: Sequence[SSMLayer],
    methods: Sequence[CutMethod],
    measurements: Sequence[Measurement],
    config: CompreSSMConfig,
) -> list[int]:
    """New state size of every layer, by the rank rule; layers of a family with one size share the largest."""
    wanted = [_wanted_size(*parts, config) for parts in zip(layers, methods, measurements, strict=True)]
    for family in {layer.adapter.family for layer in layers if not _per_layer(layer, config)}:
        members = [i for i, layer in enumerate(layers) if layer.adapter.family == family]
        largest = max(wanted[i] for i in members)
        for i in members:
            wanted[i] = min(largest, layers[i].state_size)
    gated = config.rank_rule in ("tolerance", "max_error")
    return [
        size if not gated or passes_gate(layer.state_size, size, config.min_reduction) else layer.state_size
        for layer, size in zip(layers, wanted, strict=True)
    ]


def _wanted_size(layer: SSMLayer, method: CutMethod, measurement: Measurement, config: CompreSSMConfig) -> int:
    size = layer.state_size
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
    while new_size < size and layer.adapter.values_kept(layer, method, measurement, new_size) < count:
        new_size = round_size(new_size + 1, size, multiple, config.min_state_size)
    return new_size


def _plan_layer(layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerPlan:
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
        cut = layer.adapter.cut(layer, method, measurement, size)
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
        fingerprints=tuple(fingerprint(change.parameter) for change in cut.changes),
    )


def _one_size_or_none(
    layers: Sequence[SSMLayer], plans: Sequence[LayerPlan], config: CompreSSMConfig
) -> list[LayerPlan]:
    """Where all layers of a family share one size, a layer that cannot be cut keeps the others from it too."""
    stuck = {
        plan.family: plan.name
        for layer, plan in zip(layers, plans, strict=True)
        if plan.status == "skipped" and not _per_layer(layer, config)
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
