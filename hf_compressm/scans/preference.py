"""Which of two kernels of the selective scan runs where both work: mamba-ssm's in CUDA, or ours in Triton.

mamba-ssm's adds gradients by atomic operations, one per channel, state and step, and its time depends on the number
of states in steps; ours takes the same operations per state whatever their number. So it is measured, once for each
number of states, on a small problem.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .selective_kernel import fused_selective_scan, has_kernel


logger = logging.getLogger(__name__)

BATCH, CHANNELS, LENGTH = 4, 1024, 1024
REPEATS = 3


def beats_scan(hidden_states: Tensor, dt: Tensor, A: Tensor, *others: Any, **options: Any) -> bool:
    """Whether ours is the faster one, from the arguments of `selective_scan_fn`; A is (channels, N)."""
    return _is_ours_faster(hidden_states.device, hidden_states.dtype, A.shape[1])


def beats_layer(projected_states: Tensor, *others: Any, **options: Any) -> bool:
    """Whether ours is the faster one, from the arguments of `mamba_inner_fn`, in which A is the eighth."""
    return _is_ours_faster(projected_states.device, projected_states.dtype, others[6].shape[1])


@torch.compiler.assume_constant_result
def _is_ours_faster(device: torch.device, dtype: torch.dtype, state_size: int) -> bool:
    """Whether our kernels work, and take less time than mamba-ssm's, forward and backward.

    Where deterministic algorithms are asked for, ours run: theirs do not give the same bits twice.
    """
    if not has_kernel(device, dtype):
        return False
    return torch.are_deterministic_algorithms_enabled() or _measured(device, dtype, state_size)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, state_size: int) -> bool:
    """Time both kernels; where that fails, mamba-ssm's stays."""
    kernel = kernels.SELECTIVE_SCAN

    def theirs(*tensors: Tensor) -> Tensor:
        return kernels.load(kernel)(*tensors, delta_softplus=True)

    def ours(*tensors: Any) -> Tensor:
        u, delta, A, B, C, D, z, bias = tensors
        return fused_selective_scan(u, delta, A, B, C, D, z, bias, True)[0]

    try:
        seconds = [_seconds(scan, device, dtype, state_size) for scan in (theirs, ours)]
    except Exception as error:  # such as too little memory
        logger.info(f"The kernels of the selective scan cannot be compared: {type(error).__name__}: {error}")
        return False
    faster = "ours" if seconds[1] < seconds[0] else "mamba-ssm's"
    logger.info(
        f"Selective scans of {state_size} states on {device} in {dtype} take {1000 * seconds[0]:.2f} ms with "
        f"mamba-ssm's kernel and {1000 * seconds[1]:.2f} ms with ours: {faster} is used."
    )
    return seconds[1] < seconds[0]


def _seconds(scan: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, state_size: int) -> float:
    """The shortest time of a scan, forward and backward; nothing in it is random."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        u, delta, z = (torch.full((BATCH, CHANNELS, LENGTH), -1.0, device=device, dtype=dtype) for _ in range(3))
        B, C = (torch.ones(BATCH, state_size, LENGTH, device=device, dtype=dtype) for _ in range(2))
        A, D, bias = (-torch.ones(size, device=device) for size in ((CHANNELS, state_size), CHANNELS, CHANNELS))
        tensors = [tensor.requires_grad_() for tensor in (u, delta, A, B, C, D, z, bias)]
        grad = torch.ones_like(u)
        times = []
        for _ in range(1 + REPEATS):  # the first compiles
            torch.accelerator.synchronize(device)
            start = time.perf_counter()
            torch.autograd.grad(scan(*tensors), tensors, grad)
            torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])
