"""The ways to run a scan, and how a process is left with one of them.

| way       | Mamba-1                                  | Mamba-2                      | LRU                         |
|-----------|------------------------------------------|------------------------------|-----------------------------|
| mamba-ssm | as transformers runs it with its kernels | likewise                     |                             |
| triton    | the Triton kernels of this package       |                              | its Triton boundary kernels |
| torch     | the PyTorch scan of this package         | likewise, in matrix products | its loop                    |
"""

import functools

import torch

from hf_compressm import enable_fast_selective_scan
from hf_compressm.scans import boundary, kernels, selective_kernel, trials


MAMBA_SSM = {"scan": kernels.SELECTIVE_SCAN, "mamba": kernels.INNER, "mamba2": kernels.SPLIT_SCAN}


def force(way: str) -> None:
    """Leave this process with one way: stock models run their own code with mamba-ssm, and ours with the others."""
    if way != "triton":
        trials.KERNEL_DEVICES = frozenset()  # type: ignore[misc]
    if way != "mamba-ssm":
        kernels.tester = lambda kernel: lambda device: False  # type: ignore[assignment]
        enable_fast_selective_scan()


@functools.cache
def reason_against(way: str, family: str, device: str) -> str:
    """Why a way cannot be measured here, or nothing if it can; for the process of that way.

    Args:
        way: of the table above.
        family: `"scan"` for that of Mamba-1 alone, or `"mamba"`, `"mamba2"`, `"lru"`.
        device: its type.
    """
    if way == "mamba-ssm":
        if not kernels.is_installed("mamba_ssm"):
            return "mamba-ssm is not installed"
        kernel = MAMBA_SSM[family]
        works = kernels.tester(kernel)(device)
        return "" if works else f"{kernel.function} does not work on {device}"
    if way == "triton":
        place = torch.device(device)
        works = boundary.has_kernel(place, torch.complex64) if family == "lru" else selective_kernel.has_kernel(place)
        return "" if works else f"the Triton kernels do not work on {device}"
    return ""
