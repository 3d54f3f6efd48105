"""Applying a plan: parameters, optimizer and config change together or not at all."""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_compressm.adapters import LayerCut, find_layers, underlying
from hf_compressm.bases import keep_base_beside
from hf_compressm.compression.comparing import count_state_bytes
from hf_compressm.compression.plan import CompressionPlan, CompressionResult, LayerPlan
from hf_compressm.compression.planning import plan_compression
from hf_compressm.compression.record import record_cut
from hf_compressm.config import CompreSSMConfig
from hf_compressm.models import adopt, adopt_config, own_class, own_config_class
from hf_compressm.processes import ALONE, Processes, checksum
from hf_compressm.surgery import (
    Addition,
    NonFiniteError,
    OptimizerPlan,
    Replacement,
    Snapshot,
    commit_optimizer,
    commit_replacements,
    prepare_additions,
    prepare_optimizer,
    prepare_replacements,
    refuse_stale_caches,
    write_sizes,
    write_sizes_of_mamba_ssm,
    write_sizes_per_layer,
)


logger = logging.get_logger(__name__)


def analyze(
    model: nn.Module, config: CompreSSMConfig | None = None, calibration: Iterable[Mapping[str, Any]] | None = None
) -> CompressionPlan:
    """Measure a model's SSM layers and say what a cut would do; touches nothing.

    Args:
        model: any module with SSM layers of a known family.
        config: settings; the defaults if None.
        calibration: iterable of model-input dicts, needed by selective layers.

    Raises:
        ValueError: as `plan_compression`.
    """
    return plan_compression(model, config or CompreSSMConfig(), calibration)


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
        optimizer: the optimizer that trains the model, if any.
        optimizer_state: `"carry"` the moments of cut parameters over, or `"reset"` them.
        step: optimizer step to note in the config's record.
        processes: those that train the model together and apply the same plan together: all of them do, or none. DDP
            wrappers have to be told afterwards, by `surgery.rebuild_reducers`.

    Raises:
        ValueError: if the model was trained or changed since the plan was made, if a new parameter or moment is not
            finite, or if the optimizer is not this model's. The model is then as before.
        RuntimeError: if processes have other weights or moments than the first one; likewise.
    """
    start = time.perf_counter()
    parameters_before, state_bytes_before = _count_parameters(model), count_state_bytes(model)
    with processes.together():
        cuts = _fresh_cuts(plan)
        replacements = prepare_replacements(model, [change for _, cut in cuts for change in cut.changes])
        additions = prepare_additions([addition for _, cut in cuts for addition in cut.additions])
        optimizer_plan = None
        if optimizer:
            optimizer_plan = prepare_optimizer(optimizer, model, replacements, optimizer_state, additions)
        adopts = _needs_own_class(model, plan)
        new_config = _rewritten_config(model, plan, step, adopts) if cuts else None
        before = Snapshot(model, optimizer or None)
    processes.compare(
        lambda: _new_tensors(replacements, additions, optimizer_plan), "The weights or moments to be cut"
    )
    try:
        with processes.together():
            if cuts:
                keep_base_beside(model)
            if adopts:
                adopt(underlying(model))
            attributes = [attribute for _, cut in cuts for attribute in cut.attributes]
            commit_replacements(replacements, attributes, additions)
            if optimizer_plan is not None:
                commit_optimizer(optimizer_plan)
            if new_config is not None:
                vars(model.config).clear()
                vars(model.config).update(vars(new_config))
            for item, _ in cuts:
                refuse_stale_caches(item.layer)
    except BaseException:  # an interruption too must not leave half a cut
        before.restore()
        raise
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
    )


def compress(
    model: nn.Module,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    optimizer: Any = None,
    step: int | None = None,
    reduction_share: float = 1.0,
    processes: Processes = ALONE,
) -> CompressionResult:
    """Plan and apply one cut: after training, or in a training loop of one's own.

    Args:
        model: any module with SSM layers of a known family; changed in place.
        config: settings; those of the schedule are not used here.
        calibration: iterable of model-input dicts, needed by selective layers.
        optimizer: the optimizer that trains the model, if any; its state is carried over.
        step: optimizer step to note in the config's record.
        reduction_share: as in `plan_compression`.
        processes: as in `plan_compression` and `apply_plan`.

    Raises:
        ValueError: as `plan_compression` and `apply_plan`; the model is then as before. New parameters or moments that
            are not finite raise only under `on_nonfinite="raise"`; otherwise no layer is cut.
    """
    start = time.perf_counter()
    plan = plan_compression(model, config, calibration, reduction_share, processes)
    try:
        result = apply_plan(model, plan, optimizer, config.optimizer_state, step, processes)
    except NonFiniteError as error:
        if config.on_nonfinite == "raise":
            raise
        if processes.is_first:
            logger.warning(f"No layer is cut: {error}")
        result = apply_plan(model, plan.skipped(str(error)))
    return replace(result, seconds=time.perf_counter() - start)


def _needs_own_class(model: nn.Module, plan: CompressionPlan) -> bool:
    """Whether a stock model has to become one of this package's classes: for sizes per layer, or a projection."""
    kind = type(underlying(model))
    if own_class(kind) in (None, kind):
        return False
    new = {item.name: item.new_state_size for item in plan.layers}
    sizes = {new.get(layer.name, layer.state_size) for layer in find_layers(model)}
    return len(sizes) > 1 or any(item.cut is not None and item.cut.additions for item in plan.layers)


def _rewritten_config(model: nn.Module, plan: CompressionPlan, step: int | None, adopts: bool) -> Any:
    """A copy of the model's config with the new sizes and the cut on record; None for a model without config."""
    config = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "ssm_cfg"):
        write_sizes_of_mamba_ssm(config, max(item.new_state_size for item in plan.layers))
        return config
    if not isinstance(config, PreTrainedConfig):
        return None
    if adopts:
        adopt_config(config)
    sizes: dict[str, dict[int, int | None]] = {}
    has_room = True
    for item in plan.layers:
        layer, cut = item.layer, item.cut
        if layer is not None and cut is not None:
            for field, size in {layer.adapter.size_field: item.new_state_size, **cut.config_fields}.items():
                sizes.setdefault(field, {})[layer.index] = size
            has_room = has_room and (layer.adapter.per_layer or own_config_class(type(config)) is type(config))
    (write_sizes_per_layer if has_room else write_sizes)(config, sizes)
    record_cut(config, plan, step)
    return config


def _fresh_cuts(plan: CompressionPlan) -> list[tuple[LayerPlan, LayerCut]]:
    """The layers to cut, after making sure that their parameters are those that were planned for."""
    cuts = []
    for item in plan.layers:
        if item.status != "cut":
            continue
        if item.cut is None:
            raise ValueError("This plan was applied before, or stripped of its tensors. Make a new plan.")
        if tuple(checksum(change.parameter) for change in item.cut.changes) != item.fingerprints:
            raise ValueError(
                f"{item.name} was trained since the plan was made, or has other weights in another process. Make a "
                "new plan and apply it at once."
            )
        cuts.append((item, item.cut))
    return cuts


def _new_tensors(
    replacements: Sequence[Replacement], additions: Sequence[Addition], plan: OptimizerPlan | None
) -> list[Tensor]:
    """Parameters and moments that a cut puts in place, in an order that is the same in all processes."""
    moments = [value for state in (plan.states.values() if plan else ()) for value in state.values()]
    return [
        *(item.new for item in replacements),
        *(item.new for item in additions),
        *(m for m in moments if isinstance(m, Tensor)),
    ]


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
