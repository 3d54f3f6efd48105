"""What a checkpoint of a Trainer remembers of a run: the history of its cuts, and all that it needs to go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_compressm.checkpoints import records_of
from hf_compressm.compression.history import to_record
from hf_compressm.loops import Decisions
from hf_compressm.peft import underlying
from hf_compressm.training.clock import machine
from hf_compressm.training.recovery import RecoveryGuard
from hf_compressm.utils.checks import quoted


def remembered(decisions: Decisions, recovery: RecoveryGuard, model: Any, model_step: int | None) -> dict[str, Any]:
    """The record of a run, JSON-ready.

    Args:
        decisions: its cuts.
        recovery: the guard that waits for a metric.
        model: the model; records of cuts that its `config.json` has no place for are in the record of the run.
        model_step: the step of the model, where the Trainer has loaded its best one.
    """
    records, state = records_of(underlying(model)), decisions.state()
    return (
        to_record(decisions.events)
        | ({"records": records} if records else {})
        | ({} if model_step is None else {"model_step": model_step})
        | {
            "reduction_share": state["reduction_share"],
            "recovery": recovery.state(),
            "waits": state["waits"],
            "trigger": state["trigger"],
            "machine": machine(),
        }
    )


def resume(record: Mapping[str, Any], decisions: Decisions, recovery: RecoveryGuard, run_folder: Path) -> None:
    """Resume from the record of a checkpoint.

    Raises:
        ValueError: if it does not have the form that checkpoints keep.
    """
    waiting = record.get("recovery") or {}
    if not isinstance(waiting, dict):
        raise ValueError(f"The history in the checkpoint cannot be read: {quoted(record)}.")
    decisions.restore(record)
    recovery.restore(waiting, run_folder)
