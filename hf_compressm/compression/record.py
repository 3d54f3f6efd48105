"""The record of cuts that travels in `model.config.compressm`."""

import copy
from typing import Any

from hf_compressm.compression.plan import CompressionPlan


SCHEMA_VERSION = 1


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
    before = {layer.name: layer.state_size for layer in plan.layers}
    record["state_sizes_before"] = before | record["state_sizes_before"]
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
