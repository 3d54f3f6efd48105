"""Build Triton's cache in parallel: every variant of the kernels is compiled by a process of its own, one per core."""

import itertools
import multiprocessing
import os
import time
from typing import Any

import torch
from gpu_session.scale import Scale
from gpu_session.scans import inputs

from hf_compressm.scans import boundary, selective_scan


Variant = tuple[str, int, tuple[str, ...]]
BOUNDARY = "boundary"
OPTIONAL = ("z", "D", "delta_bias")


def variants(scale: Scale) -> list[Variant]:
    """Dtype, state size, and the arguments that are left out; those that models use first."""
    subsets = itertools.chain.from_iterable(itertools.combinations(OPTIONAL, count) for count in range(4))
    scans = [(dtype, size, left) for left in subsets for dtype in ("bfloat16", "float32") for size in scale.ends]
    return [*scans[:4], *((BOUNDARY, size, ()) for size in scale.lru_states), *scans[4:]]


def call(variant: Variant, scale: Scale) -> str:
    """Forward and backward once.

    Returns:
        What went wrong, or nothing.
    """
    dtype, size, left = variant
    try:
        if dtype == BOUNDARY:
            shapes = (size,), (2, 8, size), (2, size)  # of decay, inputs and initial state
            drawn = [torch.randn(shape, dtype=torch.complex64, device=scale.device) for shape in shapes]
            out = boundary.boundary_scan(*(tensor.requires_grad_() for tensor in drawn)).real
        else:
            arguments = inputs(scale.compiled, size, getattr(torch, dtype), scale.device, left)
            out = selective_scan(**arguments, delta_softplus=True)
        out.float().sum().backward()
    except Exception as error:  # other variants may work
        return f"{variant}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def build(scale: Scale, limit: float) -> dict[str, Any]:
    """Call every variant.

    Args:
        scale: which device, and which sizes.
        limit: seconds, after which the rest is left to be compiled when it is needed.
    """
    start, jobs = time.perf_counter(), [(variant, scale) for variant in variants(scale)]
    failed = []
    processes = min(os.cpu_count() or 1, len(jobs))
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        answers = [pool.apply_async(call, job) for job in jobs]
        for (variant, _), answer in zip(jobs, answers, strict=True):
            left = limit - (time.perf_counter() - start)
            try:
                failed.append(answer.get(max(0.0, left)))
            except multiprocessing.TimeoutError:
                failed.append(f"{variant}: not compiled after {limit:.0f} s")
    seconds = time.perf_counter() - start
    return {"milliseconds": 1000 * seconds, "variants": len(jobs), "failures": [text for text in failed if text]}
