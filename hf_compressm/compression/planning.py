"""Choosing the sizes that a cut gives to measured layers, and computing every new tensor."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_compressm.compression.choices import LayerChoice
from hf_compressm.compression.measuring import from_measurements, judged, measured_again
from hf_compressm.compression.plan import CompressionPlan, LayerPlan
from hf_compressm.compression.rank_rules import choose_sizes
from hf_compressm.compression.request import CutRequest
from hf_compressm.compression.sizes import why_kept
from hf_compressm.config import CompreSSMConfig, Settings, as_config
from hf_compressm.families import LayerCut, Measurement, refuse_single_batch
from hf_compressm.families.gradients import loss_of
from hf_compressm.families.refit import tried
from hf_compressm.families.standing_in import standing_in
from hf_compressm.scans.stock import fast_scans
from hf_compressm.surgery.lora import follow
from hf_compressm.utils.devices import on_host
from hf_compressm.utils.modes import outside_inference
from hf_compressm.utils.processes import ALONE, Processes, checksum
from hf_compressm.utils.randomness import undisturbed
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


def plan_cut(model: nn.Module, request: CutRequest, at_once: bool = False) -> CompressionPlan:
    """Plan a cut as `plan_compression` does, with the arguments in a request.

    Args:
        model: any module with SSM layers of a known family.
        request: settings, calibration and processes.
        at_once: whether the plan is applied before anything else happens to the model. A single process then needs no
            checksum of its weights.
    """
    by_loss = request.config.criterion == "fisher"
    if request.config.sequential and request.processes.size > 1:
        raise ValueError(
            f"sequential=True measures in one process, and {request.processes.size} train the model. Leave it out "
            "here, or cut a checkpoint with compress()."
        )
    if (request.config.sequential or by_loss) and request.calibration is not None:
        refuse_single_batch(request.calibration)
        request = replace(request, calibration=list(request.calibration))

    def plan(choices: list[LayerChoice], measurements: list[Measurement]) -> CompressionPlan:
        measurements = judged(choices, measurements, request.config)
        sizes = choose_sizes(choices, measurements, request.config, request.reduction_share)
        if request.config.sequential:
            made = _plan(choices, _one_after_another(model, request, choices, measurements, sizes))
        else:
            made = plan_sizes(choices, measurements, sizes, request.config)
        return made if at_once and request.processes.size == 1 else marked(made)

    found = from_measurements(plan, model, request)
    return replace(found, predicted_loss_change=loss_change(model, request, found)) if by_loss else found


def plan_sizes(
    choices: Sequence[LayerChoice],
    measurements: Sequence[Measurement],
    sizes: Sequence[int],
    config: CompreSSMConfig,
) -> CompressionPlan:
    """Every new tensor of measured layers that are cut to these sizes."""
    parts = zip(choices, measurements, sizes, strict=True)
    with fast_scans():  # a fit runs a layer many times
        return _plan(choices, for_each(lambda each: _plan_layer(*each, config), parts))


def marked(plan: CompressionPlan) -> CompressionPlan:
    """The plan with checksums of the parameters that it is for, by which it is refused where they have changed."""
    return replace(plan, layers=tuple(_marked(layer) for layer in plan.layers))


def fingerprints(cut: LayerCut) -> tuple[int, ...]:
    """Checksums of the parameters that a cut replaces."""
    present = on_host({number: change.parameter for number, change in enumerate(cut.changes)})
    return tuple(checksum(present[number]) for number in range(len(present)))


def _marked(layer: LayerPlan) -> LayerPlan:
    return layer if layer.cut is None else replace(layer, fingerprints=fingerprints(layer.cut))


def _plan(choices: Sequence[LayerChoice], plans: Sequence[LayerPlan]) -> CompressionPlan:
    """The plan of a model from those of its layers."""
    return CompressionPlan(tuple(_one_size_or_none(choices, plans)))


def _one_after_another(
    model: nn.Module,
    request: CutRequest,
    choices: Sequence[LayerChoice],
    measurements: Sequence[Measurement],
    sizes: Sequence[int],
) -> list[LayerPlan]:
    """The plans of layers that are each measured on what the cut layers before it give; the model does not change."""
    plans: list[LayerPlan] = []
    with ExitStack() as cut_before:
        for choice, measurement, size in zip(choices, measurements, sizes, strict=True):
            if choice.needs_data and size < choice.layer.state_size and plans:
                (measurement,) = judged([choice], measured_again(model, [choice], request), request.config)
            with fast_scans():
                plans.append(_plan_layer(choice, measurement, size, request.config))
            if plans[-1].cut is not None:
                cut_before.enter_context(standing_in(choice.layer, plans[-1].cut))
    return plans


def loss_change(model: nn.Module, request: CutRequest, plan: CompressionPlan) -> float | None:
    """What the cuts of a plan add to the mean loss of the calibration batches, by running the model in all processes.

    None where that is not finite, or where the first process has no batch.
    """
    batches = list(request.calibration or ())

    def losses() -> list[float]:
        with request.processes.together(), outside_inference(), undisturbed(model), torch.no_grad():
            found = [loss_of(request.forward(model, batch)) for batch in batches]
            return torch.stack(found).tolist() if found else []

    before = losses() if plan.changes else []
    with ExitStack() as cut:
        for layer in plan.layers:
            if layer.layer is not None and layer.cut is not None:
                cut.enter_context(standing_in(layer.layer, layer.cut))
        after = losses() if plan.changes else []
    own = [late - early for early, late in zip(before, after, strict=True)]
    changes = [change for each in request.processes.gather(own) for change in each]
    change = sum(changes) / len(changes) if changes else 0.0
    return change if math.isfinite(change) else None


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
        cut = follow(layer, layer.family.cut(layer, replace(method, refit_steps=0), measurement, size))
        if measurement.examples:
            other = method.refit_steps and layer.family.fits_other_states
            start = follow(layer, layer.family.cut(layer, method, measurement, size)) if other else None
            cut = tried(layer, cut, measurement.examples, method.refit_steps, start)
    except (ValueError, torch.linalg.LinAlgError) as error:
        logger.warning(f"{layer.name} is not cut: {error}")
        return replace(plan, status="skipped", reason=str(error))
    return replace(
        plan,
        new_state_size=size,
        energy_kept=cut.energy_kept,
        predicted_error=cut.predicted_error,
        predicted_loss_change=cut.loss_change,
        error_bound=cut.error_bound,
        status="cut",
        state_bytes=(layer.state_bytes(layer.state_size), layer.state_bytes(size)),
        reason=cut.note,
        layer=replace(layer, owner=None),  # plans travel between processes, and each has the configuration
        cut=cut,
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
        fingerprints=None,
    )
