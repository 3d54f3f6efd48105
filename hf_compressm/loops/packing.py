"""Noticing batches that hold several texts in one row, where states run from one text into the next."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_compressm.families import SSMLayer, Statistics


logger = logging.get_logger(__name__)


def warn_of_packed_texts(seen: Sequence[tuple[SSMLayer, Statistics | None]], inputs: Any) -> None:
    """Warn if a batch has several texts in one row, and states run from one into the next.

    Args:
        seen: the layers, each with what the batch shows of it.
        inputs: the batch.
    """
    found = dict(_packings(inputs))
    told = [layer for layer, item in seen if item is None or item.told_apart]
    apart = [layer for layer in told if layer.family.tells_texts_apart_by & found.keys()]
    blind = sorted({layer.family.name for layer, _ in seen if layer not in apart})
    if not found or not blind:
        return
    logger.warning(
        f"The batches are packed, several texts in one row ({next(iter(found.values()))}), and the state of "
        f"{', '.join(blind)} layers runs from one text into the next, in training and therefore in "
        "calibration. Pad instead of packing, or give Mamba-2 layers `seq_idx` "
        "(DataCollatorWithFlattening(return_seq_idx=True))."
    )


def _packings(inputs: Any) -> Iterator[tuple[str, str]]:
    """The entries of a batch that tell of several texts in a row, with how they show it."""
    entries = inputs if hasattr(inputs, "items") else {}
    mask = entries.get("attention_mask")
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            continue
        if name == "position_ids" and value.dim() == 2 and _restarts(value, mask):
            yield name, "position_ids restart"
        elif name == "seq_idx" and bool((value != value[..., :1]).any()):
            yield name, "seq_idx changes"
        elif name.startswith("cu_seq") and value.numel() > 2:
            yield name, f"{name} has {value.numel() - 1} parts"


def _restarts(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether positions go back to 0 after a token that is no padding."""
    back = (positions[:, 1:] == 0) & (positions[:, :-1] > 0)
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        back = back & (mask[:, :-1] > 0)
    return bool(torch.any(back))
