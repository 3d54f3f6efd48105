"""Whether a module of Triton kernels works on a device: it is tried once, on a small problem whose result is known."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


logger = logging.getLogger(__name__)

KERNEL_DEVICES = frozenset({"cuda"})  # device types on which Triton is tried; ROCm has this name too
ROUND_OFF = 1000  # units in the last place of the largest entry: a short trial leaves a few, a mistake millions
HALF_ROUND_OFF = 8  # the same for 16 bits, in which the result itself is rounded, and where 1000 would hide a mistake


@dataclass(frozen=True)
class Trial:
    """What is tried, and how.

    Attributes:
        module: the module of kernels, of this package.
        work: what they do, for the warning.
        results: runs the trial by the module, or by plain PyTorch if it is None, on a device in a dtype, with the same
            arguments at each call; nothing in it is random, for a trial must not change what a user's seed gives.
    """

    module: str
    work: str
    results: Callable[[ModuleType | None, torch.device, torch.dtype], list[Tensor]]


@functools.cache
def working_kernel(trial: Trial, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels if it gives the same results as PyTorch on a device; None, with one warning, if it fails.

    There is no warning where Triton is not installed, or for a device on which it is not tried.
    """
    try:
        if device.type not in KERNEL_DEVICES or importlib.util.find_spec("triton") is None:
            return None
        kernel = importlib.import_module(f"{__package__}.{trial.module}")
        error = _largest_error(trial, kernel, device, dtype)
    except Exception as exception:  # no C compiler, a GPU too old, a driver that does not fit: each raises its own
        reason = f"{type(exception).__name__}: {exception}"
    else:
        if error <= (HALF_ROUND_OFF if dtype.itemsize == 2 else ROUND_OFF):  # in this form a NaN fails
            return kernel
        reason = f"its results are off by {error:.0f} units in the last place"
    logger.warning(
        f"The Triton kernel of {trial.work} does not work on {device} in {dtype}. Slower PyTorch code with the same "
        f"results runs in its place. The reason: {reason}"
    )
    return None


@torch.no_grad()
def _largest_error(trial: Trial, kernel: ModuleType, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of a trial, in units in the last place of the largest entry."""
    actual, expected = (trial.results(module, device, dtype) for module in (kernel, None))
    errors = [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error)) / torch.finfo(dtype).eps
