"""What a checkpoint of a loop of one's own remembers: events, steps, sizes, and the batches before a cut."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_compressm.checkpoints import sizes_of
from hf_compressm.compression.history import to_record
from hf_compressm.files.batches import UnsavableBatchError, decoded, encoded
from hf_compressm.loops.decisions import Decisions
from hf_compressm.loops.forwards import ForwardBatches
from hf_compressm.utils.checks import is_count, quoted
from hf_compressm.utils.processes import Processes


logger = logging.get_logger(__name__)


def remembered(
    decisions: Decisions, batches: ForwardBatches, model: nn.Module, step: int, processes: Processes
) -> dict[str, Any]:
    """The state of a run, in plain values and tensors."""
    return (
        to_record(decisions.events)
        | decisions.state()
        | {"step": step, "rank": processes.rank, "model": sizes_of(model), "batches": _batches(batches, step)}
    )


def read_step(state: Any) -> int:
    """The number of steps that a state remembers.

    Raises:
        ValueError: if it is no state of a run.
    """
    step: Any = state.get("step") if isinstance(state, Mapping) else None
    if not is_count(step):
        raise ValueError(f"This is no state of a Compressor, as its state_dict() returns it: {quoted(state)}.")
    return int(step)


def read_batches(
    state: Mapping[str, Any], processes: Processes, device: torch.device
) -> tuple[list[Any], tuple[str, torch.dtype] | None]:
    """The batches that a state remembers, for `RecentBatches.resume`, and the autocast under which they were run.

    Raises:
        ValueError: if they cannot be read.
    """
    kept = state.get("batches")
    if kept is None:
        return [[], []], None
    if state.get("rank") != processes.rank:
        logger.warning(
            f"The state is that of process {quoted(state.get('rank'))}, and so are the batches before the next cut in "
            "it: this process measures on the steps from here on. Save the state of every process to end bit for bit "
            "the same."
        )
        return [[], []], None
    try:
        parts = decoded(kept["structure"], kept["tensors"], device)
        autocast = None if kept["autocast"] is None else (kept["autocast"][0], getattr(torch, kept["autocast"][1]))
        if [len(batch) for part in parts for batch in part] != [2] * sum(map(len, parts)) or len(parts) != 2:
            raise ValueError("two lists of pairs are needed")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"The state does not hold the batches of a run: {quoted(kept)}.") from error
    return parts, autocast


def _batches(batches: ForwardBatches, step: int) -> dict[str, Any] | None:
    """The batches before a cut; None if there are none, or they cannot be written."""
    parts = batches.parts(step)
    tensors: dict[int, tuple[str, Tensor]] = {}
    if not any(parts):
        return None
    try:
        structure = encoded(parts, tensors)
    except UnsavableBatchError as error:
        logger.warning_once(
            f"A checkpoint cannot keep the batches before a cut: {error}. A run that resumes from it measures its "
            "next cut on the steps after it alone, and does not end bit for bit the same."
        )
        return None
    autocast = batches.autocast
    return {
        "structure": structure,
        "tensors": dict(tensors.values()),
        "autocast": None if autocast is None else [autocast[0], str(autocast[1]).removeprefix("torch.")],
    }
