"""Which of the kernels of mamba-ssm and fla work on this machine: a tiny call on zeros is tried for each.

A successful import proves little: mamba-ssm may be installed without its CUDA extension, and a Triton kernel takes no
CPU tensors. A kernel works on a device type if a tiny call of it succeeds there.

Sizes of the calls: 8 channels, states and steps for Mamba-1; 8 heads of 16 channels, 16 states and steps for Mamba-2,
the smallest that Triton's matrix products allow; 2 heads of 16 channels and 16 steps for the delta rule.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """A function of a package: where it lives, and a tiny call of it, `probe(function, device)`."""

    module: str
    function: str
    probe: Callable[[Callable, str], Any]
    package: str = "mamba_ssm"


def tester(kernel: Kernel | None) -> Callable[[str], bool]:
    """A function that tells whether a kernel works on a device type; it is tried when that is first asked."""

    @torch.compiler.assume_constant_result
    def works(device: str) -> bool:
        return kernel is not None and _works(kernel, device)

    return works


def forget_trials() -> None:
    """Try every kernel anew when it is next asked for: packages may have been installed."""
    _works.cache_clear()


@functools.cache
def _works(kernel: Kernel, device: str) -> bool:
    """Whether a tiny call of a kernel succeeds on a device type."""
    if not is_installed(kernel.package):
        return False
    try:
        function = load(kernel)
    except Exception:  # a half-installed package fails in many ways; transformers treats them all alike
        return False
    autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    try:
        with torch.no_grad(), autocast:
            kernel.probe(function, device)
    except Exception as error:  # a kernel may raise anything, assertions included
        logger.info(f"{kernel.package}'s {kernel.function} does not work on {device}: {type(error).__name__}: {error}")
        return False
    return True


def load(kernel: Kernel) -> Callable[..., Any]:
    """The function of a kernel; raises whatever its package raises when it is imported."""
    return getattr(importlib.import_module(f"{kernel.package}.{kernel.module}"), kernel.function)


def is_installed(package: str) -> bool:
    """Whether a package of kernels can be imported, which is when transformers binds to it."""
    try:
        importlib.import_module(package)
    except Exception:  # as above: whatever fails, there is no kernel
        return False
    return True


def is_kernelized(stock: Callable) -> bool:
    """Whether the kernels package has replaced a function by a Hub kernel; it does so per instance."""
    return isinstance(stock, nn.Module) and "forward" in vars(stock)


def torch_path(stock: Callable) -> Callable:
    """The plain PyTorch function under transformers' and the kernels package's wrappers; `stock` if it has none."""
    if isinstance(stock, nn.Module):  # the kernels package turns a function into a module that closes over it
        forward = type(stock).forward
        stock = inspect.getclosurevars(forward).nonlocals.get("func", stock)
    return inspect.unwrap(stock)


def _probe_selective_scan(kernel: Callable, device: str) -> None:
    """Call `selective_scan_fn` once."""
    square, cube = _zeros(device, (8, 8), (1, 8, 8))
    kernel(cube, cube, square, cube, cube, delta_softplus=True)


def _probe_inner(kernel: Callable, device: str) -> None:
    """Call `mamba_inner_fn` once, with step sizes of rank 1."""
    projected, conv, x_proj, dt_proj = _zeros(device, (1, 16, 8), (8, 1, 4), (17, 8), (8, 1))
    square, row = _zeros(device, (8, 8), (8,))
    weights = (conv, row, x_proj, dt_proj, square, None, square)
    kernel(projected, *weights, None, None, row, delta_bias=row, delta_softplus=True)


def _probe_channel_update(kernel: Callable, device: str) -> None:
    """Call `selective_state_update` once, as Mamba-1 does."""
    state, square, row = _zeros(device, (1, 8, 8), (8, 8), (1, 8))
    kernel(state, row, row, square, row, row, dt_softplus=True)


def _probe_chunk_scan(kernel: Callable, device: str) -> None:
    """Call `mamba_chunk_scan_combined` once."""
    x, dt, vectors, heads = _zeros(device, (1, 16, 8, 16), (1, 16, 8), (1, 16, 1, 16), (8,))
    kernel(x, dt, heads, vectors, vectors, chunk_size=16, D=heads, dt_bias=heads, dt_softplus=True)


def _probe_split_scan(kernel: Callable, device: str) -> None:
    """Call `mamba_split_conv1d_scan_combined` once: gate, x, B, C and dt side by side are 296 columns."""
    projected, conv, conv_bias, heads = _zeros(device, (1, 16, 296), (160, 4), (160,), (8,))
    norm, out_proj = _zeros(device, (128,), (128, 128))
    kernel(
        projected,
        conv,
        conv_bias,
        heads,
        heads,
        D=heads,
        chunk_size=16,
        rmsnorm_weight=norm,
        outproj_weight=out_proj,
        headdim=16,
        norm_before_gate=False,
    )


def _probe_head_update(kernel: Callable, device: str) -> None:
    """Call `selective_state_update` once, as Mamba-2 does."""
    state, x, A, vector = _zeros(device, (1, 8, 16, 16), (1, 8, 16), (8, 16, 16), (1, 1, 16))
    kernel(state, x, x, A, vector, vector, dt_softplus=True)


def _probe_gated_delta_rule(kernel: Callable, device: str) -> None:
    """Call `chunk_gated_delta_rule` or `fused_recurrent_gated_delta_rule` once."""
    vectors, per_head = _zeros(device, (1, 16, 2, 16), (1, 16, 2))
    kernel(vectors, vectors, vectors, g=per_head, beta=per_head, initial_state=None, output_final_state=False)


def _probe_kimi_delta_attention(kernel: Callable, device: str) -> None:
    """Call `chunk_kda` or `fused_recurrent_kda` once."""
    vectors, per_head = _zeros(device, (1, 16, 2, 16), (1, 16, 2))
    kernel(vectors, vectors, vectors, g=vectors, beta=per_head, initial_state=None, output_final_state=False)


def _zeros(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """A float32 tensor of zeros for each shape."""
    return [torch.zeros(shape, device=device) for shape in shapes]


SELECTIVE_SCAN = Kernel("ops.selective_scan_interface", "selective_scan_fn", _probe_selective_scan)
INNER = Kernel("ops.selective_scan_interface", "mamba_inner_fn", _probe_inner)
CHANNEL_UPDATE = Kernel("ops.triton.selective_state_update", "selective_state_update", _probe_channel_update)
CHUNK_SCAN = Kernel("ops.triton.ssd_combined", "mamba_chunk_scan_combined", _probe_chunk_scan)
SPLIT_SCAN = Kernel("ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined", _probe_split_scan)
HEAD_UPDATE = Kernel("ops.triton.selective_state_update", "selective_state_update", _probe_head_update)
GATED_DELTA_RULE = Kernel("ops.gated_delta_rule", "chunk_gated_delta_rule", _probe_gated_delta_rule, "fla")
GATED_DELTA_UPDATE = Kernel("ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", _probe_gated_delta_rule, "fla")
KIMI_DELTA_ATTENTION = Kernel("ops.kda", "chunk_kda", _probe_kimi_delta_attention, "fla")
KIMI_DELTA_UPDATE = Kernel("ops.kda", "fused_recurrent_kda", _probe_kimi_delta_attention, "fla")
