"""The record of cuts that travels in `model.config.compressm`."""

import copy
from dataclasses import dataclass
from typing import Any

from hf_compressm.plan import CompressionPlan, CompressionResult

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class CutEvent:
    """One cut of a training run, tried at the start of step `step + 1`.

    Attributes:
        step: optimizer steps done before it.
        result: what it did, with every layer's spectrum in `result.plan`.
    """

    step: int
    result: CompressionResult


def record_cut(config: Any, plan: CompressionPlan, step: int | None = None) -> None:
    """Append one cut to the config's `compressm` record.

    The record is a small JSON object: `schema_version`, `method`, `state_sizes_before` (before the first cut),
    `state_sizes_after` (now) and `cuts`, one entry each with its step, sizes, criteria and predicted errors.

    Args:
        config: a transformers config; its other fields stay.
        plan: that is being applied.
        step: optimizer step after which it happened, None outside training.
    """
    sizes = {layer.name: layer.new_state_size for layer in plan.layers}
    record = copy.deepcopy(getattr(config, "compressm", None)) or {
        "schema_version": SCHEMA_VERSION,
        "method": "CompreSSM (arXiv:2510.02823)",
        "state_sizes_before": {},
        "state_sizes_after": {},
        "cuts": [],
    }
    record["state_sizes_before"] = {layer.name: layer.state_size for layer in plan.layers} | record["state_sizes_before"]
    record["state_sizes_after"] |= sizes
    record["cuts"].append(
        {
            "step": step,
            "state_sizes": sizes,
            "criterion": {layer.name: layer.criterion for layer in plan.layers},
            "predicted_error": {layer.name: layer.predicted_error for layer in plan.layers},
        }
    )
    config.compressm = record


def recorded_cuts(config: Any) -> list[dict[str, Any]]:
    """The cuts that a config's record tells of, oldest first; empty without one."""
    return list((getattr(config, "compressm", None) or {}).get("cuts", []))


def scalars(event: CutEvent) -> dict[str, float]:
    """Flat numbers of one cut for a Trainer's log; layers are numbered in model order."""
    result = event.result
    layers = result.plan.layers
    values: dict[str, float] = {
        "compressm/cut": float(result.changed),
        "compressm/state_size_mean": sum(layer.new_state_size for layer in layers) / len(layers),
        "compressm/energy_kept": min(layer.energy_kept for layer in layers),
        "compressm/predicted_error": max(layer.predicted_error for layer in layers),
        "compressm/skipped_layers": float(sum(layer.status == "skipped" for layer in layers)),
        "compressm/parameters": float(result.parameters_after),
        "compressm/seconds": result.seconds,
    }
    bounds = [layer.error_bound for layer in layers if layer.error_bound is not None]
    if bounds:
        values["compressm/error_bound"] = max(bounds)
    for number, layer in enumerate(layers):
        values[f"compressm/layer_{number:02d}/state_size"] = float(layer.new_state_size)
    return values
