"""Applying a plan: parameters, optimizer and config change together or not at all."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_compressm.compression.comparing import count_state_bytes
from hf_compressm.compression.plan import CompressionPlan, CompressionResult
from hf_compressm.compression.planning import fingerprints, plan_compression, plan_cut
from hf_compressm.compression.record import record_cut
from hf_compressm.compression.request import CutRequest
from hf_compressm.config import CompreSSMConfig, Settings, as_config
from hf_compressm.families import Holder, LayerCut, SSMLayer, find_layers
from hf_compressm.models import own_class
from hf_compressm.peft import underlying
from hf_compressm.surgery import (
    NonFiniteError,
    Operation,
    Snapshot,
    rewritten,
    tell_undescribed,
)
from hf_compressm.surgery.configuration import Copies, Fields
from hf_compressm.utils.modes import plain_modes
from hf_compressm.utils.processes import ALONE, Processes


logger = logging.get_logger(__name__)


def analyze(
    model: nn.Module, config: Settings = None, calibration: Iterable[Mapping[str, Any]] | None = None
) -> CompressionPlan:
    """Measure a model's SSM layers and plan a cut, without changing the model.

    Args:
        model: any module with SSM layers of a known family.
        config: settings, as an object, a mapping, or the path of a YAML or JSON file; the defaults if None.
        calibration: iterable of model-input dicts, needed by selective layers.

    Raises:
        ValueError: as `plan_compression`.
    """
    return plan_compression(model, config, calibration)


def apply_plan(
    model: nn.Module,
    plan: CompressionPlan,
    optimizer: Any = None,
    optimizer_state: str = "carry",
    step: int | None = None,
    processes: Processes = ALONE,
) -> CompressionResult:
    """Carry out a plan: parameters, optimizer state and config change together or not at all.

    Args:
        model: the model that was planned for, unchanged since.
        plan: from `plan_compression` or `analyze`.
        optimizer: the optimizer that trains the model, if any, or a list of several; one that was made before now
            and is not passed goes on training the old tensors.
        optimizer_state: `"carry"` the moments of cut parameters over, or `"reset"` them.
        step: optimizer step to note in the config's record.
        processes: the processes that train the model and apply the same plan together; all of them apply it, or
            none. DDP wrappers must be rebuilt afterwards, with `surgery.rebuild_reducers`.

    Raises:
        ValueError: if the model was trained or changed since the plan was made, if a new parameter or moment is not
            finite, or if the optimizer is not this model's. The model is then unchanged.
        RuntimeError: if a process has other weights or moments than the first one; the model is then unchanged.
    """
    config = CompreSSMConfig(optimizer_state=optimizer_state)
    return apply_cut(model, plan, CutRequest(config, optimizer=optimizer, step=step, processes=processes))


@plain_modes()
def apply_cut(model: nn.Module, plan: CompressionPlan, request: CutRequest) -> CompressionResult:
    """Apply a plan as `apply_plan` does, with the arguments in a request."""
    start, processes = time.perf_counter(), request.processes
    parameters_before, state_bytes_before = _count_parameters(model), count_state_bytes(model)
    with processes.together():
        cuts = _fresh_cuts(plan)
        operation = Operation.prepare(model, cuts, request.optimizer, request.config.optimizer_state)
        adopts = _needs_own_class(model, plan)
        configs = _rewritten_configs(model, plan, request.step, adopts) if cuts else None
        before = Snapshot(model, request.optimizer or None)
    processes.compare(operation.new_tensors, "The weights or moments to be cut")
    try:
        with processes.together():
            operation.commit(configs, adopts)
    except BaseException:  # an interruption too must not leave half a cut
        before.restore()
        raise
    note = _without_optimizer(cuts, request)
    return CompressionResult(
        plan=plan.without_tensors(),
        changed=bool(cuts),
        seconds=time.perf_counter() - start,
        state_sizes_before={layer.name: layer.state_size for layer in plan.layers},
        state_sizes_after={layer.name: layer.new_state_size for layer in plan.layers},
        parameters_before=parameters_before,
        parameters_after=_count_parameters(model),
        state_bytes_before=state_bytes_before,
        state_bytes_after=count_state_bytes(model),
        note=note,
    )


def compress(  # noqa: PLR0913 - public
    model: nn.Module,
    config: Settings,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    optimizer: Any = None,
    step: int | None = None,
    reduction_share: float = 1.0,
    processes: Processes = ALONE,
) -> CompressionResult:
    """Plan and apply one cut: after training, or in a custom training loop.

    Args:
        model: any module with SSM layers of a known family; changed in place.
        config: settings, as in `analyze`; those of the schedule are ignored.
        calibration: iterable of model-input dicts, needed by selective layers.
        optimizer: the optimizer that trains the model, if any, or a list of several; its state is carried over.
            Without it, an optimizer that was made before now goes on training the old tensors, which the model no
            longer has: make a new one.
        step: optimizer step to note in the config's record.
        reduction_share: as in `plan_compression`.
        processes: as in `plan_compression` and `apply_plan`.

    Raises:
        ValueError: as `plan_compression` and `apply_plan`; the model is then unchanged. New parameters or moments that
            are not finite raise only under `on_nonfinite="raise"`; otherwise no layer is cut.
    """
    return cut(model, CutRequest(as_config(config), calibration, optimizer, step, reduction_share, processes))


def cut(model: nn.Module, request: CutRequest) -> CompressionResult:
    """Plan and apply one cut as `compress` does, with the arguments in a request."""
    start = time.perf_counter()
    plan = plan_cut(model, request, at_once=True)
    try:
        result = apply_cut(model, plan, request)
    except NonFiniteError as error:
        if request.config.on_nonfinite == "raise":
            raise
        if request.processes.is_first:
            logger.warning(f"No layer is cut: {error}")
        result = apply_plan(model, plan.skipped(str(error)))
    return replace(result, seconds=time.perf_counter() - start)


def _without_optimizer(cuts: Sequence[tuple[SSMLayer, LayerCut]], request: CutRequest) -> str:
    """What to do about an optimizer that was not passed, or ""; a warning if the model is being trained."""
    if not cuts or request.optimizer:
        return ""
    note = (
        "No optimizer was passed: one that was made before this cut goes on training the old tensors, which the model "
        "no longer has. Make a new optimizer, or pass it as optimizer= to carry its state over."
    )
    is_training = any(change.parameter.grad is not None for _, cut in cuts for change in cut.changes)
    if request.processes.is_first:
        (logger.warning if is_training else logger.info)(note)
    return note


def _needs_own_class(model: nn.Module, plan: CompressionPlan) -> bool:
    """Whether a stock model must become one of this package's classes: for sizes per layer, or a projection."""
    kind = type(underlying(model))
    if own_class(kind) in (None, kind):
        return False
    new = {item.name: item.new_state_size for item in plan.layers}
    sizes = {new.get(layer.name, layer.state_size) for layer in find_layers(model)}
    return len(sizes) > 1 or any(item.cut is not None and item.cut.additions for item in plan.layers)


def _rewritten_configs(model: nn.Module, plan: CompressionPlan, step: int | None, adopts: bool) -> Copies:
    """Copies of the model's configurations with the new sizes, and the cut on record in each."""
    layers = {layer.name: layer for layer in find_layers(model)}
    planned = {item.name: item for item in plan.layers}
    values: dict[str, Fields] = {}
    for item in plan.layers:
        if item.cut is not None:
            layer = layers[item.name]
            sizes = layer.family.configured(layer.module, item.new_state_size)
            values[item.name] = {**sizes, **item.cut.config_fields}

    def record(config: Any, holder: Holder, names: Sequence[str]) -> None:
        own = (replace(planned[name], name=holder.relative(name)) for name in names)
        record_cut(config, CompressionPlan(tuple(own), plan.predicted_loss_change), step)

    considered = [layers[name] for name in planned]
    configs = rewritten(model, considered, values, record, adopts)
    tell_undescribed(model, [layer for layer in considered if layer.name in values])
    return configs


def _fresh_cuts(plan: CompressionPlan) -> list[tuple[SSMLayer, LayerCut]]:
    """The layers to cut; raises `ValueError` if their parameters are not those that were planned for."""
    cuts = []
    for item in plan.layers:
        if item.status != "cut":
            continue
        if item.cut is None or item.layer is None:
            raise ValueError("This plan was applied before, or stripped of its tensors. Make a new plan.")
        if item.fingerprints is not None and fingerprints(item.cut) != item.fingerprints:
            raise ValueError(
                f"{item.name} was trained since the plan was made, or has other weights in another process. Make a "
                "new plan and apply it at once."
            )
        cuts.append((item.layer, item.cut))
    return cuts


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
