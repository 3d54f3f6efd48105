"""Tensors between host and device. The host waits for a GPU at every copy from it, so that there are to be few."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor


K = TypeVar("K")

WITH_FLOAT64 = ("cpu", "cuda")
"""Kinds of devices that have float64."""


def lacks_float64(device: torch.device) -> bool:
    """Whether a device has no float64."""
    return device.type not in WITH_FLOAT64


def summing_dtype(device: torch.device) -> torch.dtype:
    """The type for long sums and small differences: float64 where the device has it."""
    return torch.float32 if lacks_float64(device) else torch.float64


def on_host(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Tensors on the CPU, without gradients, moved in one copy for each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[K]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault((tensor.device, tensor.dtype), []).append(name)
    moved: dict[K, Tensor] = {}
    for (device, _), names in kinds.items():
        values = [tensors[name].detach() for name in names]
        if device.type != "cpu":
            pieces = torch.cat([value.flatten() for value in values]).cpu().split([value.numel() for value in values])
            values = [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]
        moved |= dict(zip(names, values, strict=True))
    return moved


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for what the device has still to do.

    A GPU takes a copy of ordinary memory before the call returns. An MPS device reads the memory itself, later, and
    what comes to the CPU without a wait is not there yet.
    """
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))


def first_not_finite(tensors: Sequence[Tensor]) -> int | None:
    """The place of the first tensor with NaN or infinity, or None; each device is asked once."""
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    wrong = []
    for places in by_device.values():
        finite = torch.stack([torch.isfinite(tensors[place].detach()).all() for place in places]).tolist()
        wrong += [place for place, is_finite in zip(places, finite, strict=True) if not is_finite]
    return min(wrong, default=None)
