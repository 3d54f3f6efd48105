"""What stands in for the functions of transformers' modeling files, and decides per call, by device.

| word        | meaning                                                                                            |
|-------------|----------------------------------------------------------------------------------------------------|
| stock       | the function of the modeling file as it was found, with whatever it dispatches to                  |
| torch path  | the plain PyTorch function underneath it                                                           |
| kernel      | the function of the same job in mamba-ssm or fla; `kernels.py` finds out on which devices it works |
| job         | scan, fused training layer, single-step update, or short convolution                               |
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_mambapy_available

from . import kernels
from .convolution import causal_convolution, is_fast_convolution, packed_convolution
from .delta import delta_scan
from .exported import selective_scan_for_export
from .selective import selective_scan
from .ssd import ssd_scan
from .transforms import is_exported, is_transformed


Works = Callable[[str], bool]  # whether the kernel for a job works on a device type
Beats = Callable[..., bool]  # whether the fast scan takes less time than that kernel, from the arguments of the job


def never(*args: Any, **kwargs: Any) -> bool:
    """A kernel that works is not compared with the fast scan."""
    return False


@dataclass(frozen=True)
class Job:
    """A function of a modeling file by its name, the kernel for it if any, and what makes its dispatcher."""

    name: str
    kernel: kernels.Kernel | None
    dispatcher: Callable[[Callable, Works], Callable]


def scan_dispatcher(
    stock: Callable,
    works: Works,
    fast: Callable,
    can_be_exported: bool,
    keeps_apart: bool,
    package: str = "mamba_ssm",
    beats: Beats = never,
) -> Callable:
    """The scan of a modeling file, with a fast one in place of its PyTorch code, which may keep packed texts apart."""
    torch_path = kernels.torch_path(stock)
    plain = torch_path if kernels.is_installed(package) else stock

    @functools.wraps(torch_path)
    def dispatched_scan(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        function = fast
        is_packed = kwargs.get("seq_idx") is not None
        device = hidden_states.device.type
        if kernels.is_kernelized(stock) or (works(device) and not beats(hidden_states, *args, **kwargs)):
            function = stock
        elif is_packed and keeps_apart and not _needs_plain_operators(can_be_exported):
            pass
        elif is_packed or kwargs.get("cu_seqlens") is not None:
            function = stock  # these packed sequences need a kernel: the stock code says so
        elif is_transformed():
            function = plain
        elif kwargs.get("use_mambapy") and is_mambapy_available():
            function = plain
        elif _needs_plain_operators(can_be_exported):
            function = plain
        return function(hidden_states, *args, **kwargs)

    return dispatched_scan


def fused_dispatcher(stock: Callable, works: Works, beats: Beats = never) -> Callable:
    """The fused training layer; without a kernel to prefer it returns None: "not available, take the unfused path"."""

    @functools.wraps(kernels.torch_path(stock))
    def dispatched_fused(projected_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        device = projected_states.device.type
        if kernels.is_kernelized(stock) or (works(device) and not beats(projected_states, *args, **kwargs)):
            return stock(projected_states, *args, **kwargs)
        return None

    return dispatched_fused


def update_dispatcher(stock: Callable, works: Works, package: str = "mamba_ssm") -> Callable:
    """The single-step update of generation, with the torch path if an installed kernel does not work."""
    if not kernels.is_installed(package):
        return stock
    torch_path = kernels.torch_path(stock)

    @functools.wraps(torch_path)
    def dispatched_update(state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        has_kernel = kernels.is_kernelized(stock) or works(state.device.type)
        return (stock if has_kernel else torch_path)(state, *args, **kwargs)

    return dispatched_update


def convolution_dispatcher(stock: Callable, works: Works) -> Callable:
    """The convolution before the scan: a fast one on the CPU, and without a kernel one that keeps packed texts apart.

    A kernel is expected to work on every device but the CPU, where transformers would run it too.
    """
    torch_path = kernels.torch_path(stock)
    is_installed = importlib.util.find_spec("causal_conv1d") is not None

    @functools.wraps(torch_path)
    def dispatched_convolution(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = hidden_states, weight, bias
        is_on_cpu = hidden_states.device.type == "cpu"
        if seq_idx is not None and (is_on_cpu or not (is_installed or kernels.is_kernelized(stock))):
            out = packed_convolution(*given, seq_idx=seq_idx)
            return out if activation is None else ACT2FN[activation](out)
        if is_on_cpu and not (kernels.is_kernelized(stock) or _is_traced() or is_transformed()):
            if is_fast_convolution(*given, activation):
                return causal_convolution(*given, activation)
        return stock(*given, activation=activation, seq_idx=seq_idx, **kwargs)

    return dispatched_convolution


def fast_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **ignored: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in the dtype that the stock loop returns: D and z may lift it above that of the input."""
    dtype = hidden_states.dtype
    for tensor in (D, z):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    scan = selective_scan_for_export if is_exported() else selective_scan
    result = scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if isinstance(result, tuple):
        return result[0].to(dtype), result[1]
    return result.to(dtype)


def fast_ssd_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **ignored: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_scan` in the dtypes that the stock code returns: float32, which only a D in float64 lifts.

    The chunk size of the model belongs to the kernel: the fast scan has its own.
    """
    dtype = torch.float32 if D is None else torch.promote_types(torch.float32, D.dtype)
    x = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
    y, final_states = ssd_scan(
        x, dt, A, B, C, None, D, z, dt_bias, initial_states, seq_idx, None, dt_softplus, dt_limit, True
    )
    return (y.to(dtype), final_states.float()) if return_final_states else y.to(dtype)


def fast_delta_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    seq_idx: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, Tensor | None]:
    """`delta_scan` in the dtypes that the stock code returns, that of query and float32; it has its own chunk size."""
    out, state = delta_scan(
        query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, None, seq_idx
    )
    return out, None if state is None else state.float()


def _needs_plain_operators(can_be_exported: bool) -> bool:
    """Whether a program is recorded that must have operators of torch alone, which the fast scan has not."""
    return torch.jit.is_tracing() or (is_exported() and not can_be_exported)


def _is_traced() -> bool:
    """Whether the operations are recorded instead of only run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
