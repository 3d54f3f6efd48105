"""Times on a device, and its memory."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(work: Callable[[], Any], device: str, repeats: int, warm_up: int = 2) -> float:
    """The median of several, each between two events of the device; on a CPU by the clock."""
    for _ in range(warm_up):
        work()
    return statistics.median(_once(work, device) for _ in range(repeats))


def _once(work: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run."""
    if device != "cuda":
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def peak_memory(device: str) -> float | None:
    """The most that tensors have held on a GPU since the last reset, in GiB; None elsewhere."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
