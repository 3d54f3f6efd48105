"""Fast scans for stock transformers models, wherever no kernel works.

transformers picks a scan when a modeling file is imported: mamba-ssm's function if that package can be imported,
else a plain PyTorch one that is correct and slow. It does not notice that mamba-ssm was installed without its CUDA
extension (the default since 2.3.2: the function imports, and raises when called), nor that the tensors are on the
CPU. Here the functions of the modeling files are replaced by dispatchers that decide per call, by device:

| word        | meaning                                                                             |
|-------------|-------------------------------------------------------------------------------------|
| stock       | the function of the modeling file as it was found, with whatever it dispatches to   |
| torch path  | the plain PyTorch function underneath it                                            |
| kernel      | mamba-ssm's function of the same job; `kernels.py` finds out on which devices it works |
| job         | scan, fused training layer, single-step update, or convolution of packed texts      |

A modeling file is one row of `_FAMILIES`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.utils import logging
from transformers.utils.import_utils import is_mambapy_available

from . import kernels
from .exported import selective_scan_for_export
from .selective import selective_scan
from .ssd import ssd_scan, text_starts
from .transforms import is_transformed


logger = logging.get_logger(__name__)


def enable_fast_selective_scan() -> bool:
    """Make stock Mamba and Mamba-2 models, and the hybrids built on them, run the fast scans of this package.

    The families are Mamba, FalconMamba, Jamba and Zamba on `selective_scan`, and Mamba2, Bamba, Zamba2, FalconH1,
    GraniteMoeHybrid and NemotronH on `ssd_scan`. Their modeling files are imported here (0.2 s for all of them), so
    this may be called before or after a model is made.

    The choice is made per call. A working kernel (mamba-ssm on this device, or one from the Hub that
    `use_kernels=True` put in place) runs untouched, and `use_mambapy=True` is obeyed. Under `torch.compile`,
    `torch.jit.trace` and `torch.export` the stock PyTorch code runs, except for Mamba-1 layouts under `torch.export`:
    they run a scan that leaves the length open, which the stock code cannot. Inside a transform of `torch.func` the
    stock PyTorch code runs too. In all other cases the fast scan runs.
    Packed texts (`seq_idx`) are kept apart in Mamba-2 layouts, where the stock code refuses them without a kernel; in
    Mamba-1 layouts it decides.
    Results, dtypes and caches are those of the stock code. This may be called any number of times, and looks for
    kernels each time; `disable_fast_selective_scan` undoes it.

    Returns:
        Whether stock models of any of these families now run a fast scan on the current accelerator (on the CPU if
        there is none): True without a working kernel, False with kernels for all of them, or if this version of
        transformers is not recognised.
    """
    with _LOCK:
        disable_fast_selective_scan()
        jobs = {job for family_jobs in _FAMILIES.values() for job in family_jobs}
        devices = {job: frozenset() if job.kernel is None else kernels.working_devices(job.kernel) for job in jobs}
        in_use = [_enable_family(name, family_jobs, devices) for name, family_jobs in _FAMILIES.items()]
    return any(in_use)


def disable_fast_selective_scan() -> bool:
    """Put back the functions that `enable_fast_selective_scan` replaced.

    Returns:
        Whether the fast scan is in use now; always False.
    """
    with _LOCK:
        for name, patch in list(_PATCHES.items()):
            for attribute, replacement in patch.replacements.items():
                if getattr(patch.module, attribute, None) is replacement:
                    setattr(patch.module, attribute, patch.originals[attribute])
                else:
                    logger.warning(f"{name}.{attribute} was replaced by other code in the meantime; it is left alone.")
            del _PATCHES[name]
    return False


def _fast_selective_scan(
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
    scan = selective_scan_for_export if torch.compiler.is_exporting() else selective_scan
    result = scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if isinstance(result, tuple):
        return result[0].to(dtype), result[1]
    return result.to(dtype)


def _fast_ssd_scan(
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


def _scan_dispatcher(
    stock: Callable, kernel_devices: frozenset[str], fast: Callable, can_be_exported: bool, keeps_apart: bool
) -> Callable:
    """The scan of a modeling file, with a fast one in place of its PyTorch code, which may keep packed texts apart."""
    torch_path = kernels.torch_path(stock)
    plain = torch_path if kernels.is_kernel_installed() else stock

    @functools.wraps(torch_path)
    def dispatched_scan(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        function = fast
        is_packed = kwargs.get("seq_idx") is not None
        if hidden_states.device.type in kernel_devices or kernels.is_kernelized(stock):
            function = stock
        elif kwargs.get("cu_seqlens") is not None or (is_packed and (_is_traced() or not keeps_apart)):
            function = stock  # these packed sequences need a kernel: the stock code says so
        elif is_packed:
            pass
        elif is_transformed():
            function = plain
        elif kwargs.get("use_mambapy") and is_mambapy_available():
            function = plain
        elif _is_traced() and not (can_be_exported and torch.compiler.is_exporting()):
            function = plain
        return function(hidden_states, *args, **kwargs)

    return dispatched_scan


def _fused_dispatcher(stock: Callable, kernel_devices: frozenset[str]) -> Callable:
    """The fused training layer; without a working kernel it returns None: "not available, take the unfused path"."""

    @functools.wraps(kernels.torch_path(stock))
    def dispatched_fused(projected_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if projected_states.device.type in kernel_devices or kernels.is_kernelized(stock):
            return stock(projected_states, *args, **kwargs)
        return None

    return dispatched_fused


def _update_dispatcher(stock: Callable, kernel_devices: frozenset[str]) -> Callable:
    """The single-step update of generation, with the torch path if an installed kernel does not work."""
    if not kernels.is_kernel_installed():
        return stock
    torch_path = kernels.torch_path(stock)

    @functools.wraps(torch_path)
    def dispatched_update(state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        works = state.device.type in kernel_devices or kernels.is_kernelized(stock)
        return (stock if works else torch_path)(state, *args, **kwargs)

    return dispatched_update


def _convolution_dispatcher(stock: Callable, kernel_devices: frozenset[str]) -> Callable:
    """The convolution before the scan; without a kernel, packed texts, which stock refuses, are kept apart here.

    A kernel is expected to work on every device but the CPU, where transformers would run it too.
    """

    @functools.wraps(kernels.torch_path(stock))
    def dispatched_convolution(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        has_kernel = kernels.is_kernelized(stock) or importlib.util.find_spec("causal_conv1d") is not None
        if kwargs.get("seq_idx") is None or (has_kernel and hidden_states.device.type != "cpu"):
            return stock(hidden_states, *args, **kwargs)
        return packed_convolution(hidden_states, *args, **kwargs)

    return dispatched_convolution


def packed_convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor,
    **ignored: Any,
) -> Tensor:
    """Causal convolution of `(batch, channels, length)` by `(channels, taps)` within texts, as the kernel does it.

    Steps from a cache may come before those of `seq_idx`: they belong to the first text of their row.
    """
    length, taps = hidden_states.shape[-1], weight.shape[-1]
    text = F.pad(text_starts(seq_idx).cumsum(1), (length - seq_idx.shape[1], 0))
    inputs = hidden_states.to(weight.dtype)
    out = torch.zeros_like(inputs) if bias is None else bias[:, None].expand_as(inputs)
    for lag in range(min(taps, length)):
        is_same = text[:, lag:] == text[:, : length - lag]
        term = weight[:, taps - 1 - lag, None] * inputs[..., : length - lag] * is_same[:, None]
        out = out + F.pad(term, (lag, 0))
    return (out if activation is None else ACT2FN[activation](out)).to(hidden_states.dtype)


def _is_traced() -> bool:
    """Whether the operations are recorded instead of only run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@dataclass(frozen=True)
class _Job:
    """A function of a modeling file by its name, mamba-ssm's kernel for it if any, and what makes its dispatcher."""

    name: str
    kernel: kernels.Kernel | None
    dispatcher: Callable[[Callable, frozenset[str]], Callable]


_SELECTIVE = _Job(
    "mamba_selective_scan",
    kernels.SELECTIVE_SCAN,
    functools.partial(_scan_dispatcher, fast=_fast_selective_scan, can_be_exported=True, keeps_apart=False),
)
_SELECTIVE_FUSED = _Job("mamba_inner_fn", kernels.INNER, _fused_dispatcher)
_SELECTIVE_UPDATE = _Job("mamba_selective_state_update", kernels.CHANNEL_UPDATE, _update_dispatcher)
_MAMBA = (_SELECTIVE, _SELECTIVE_FUSED, _SELECTIVE_UPDATE)
_MAMBA2 = (
    _Job(
        "mamba2_chunk_scan",
        kernels.CHUNK_SCAN,
        # The stock code can be exported.
        functools.partial(_scan_dispatcher, fast=_fast_ssd_scan, can_be_exported=False, keeps_apart=True),
    ),
    _Job("mamba2_split_conv1d_scan_combined", kernels.SPLIT_SCAN, _fused_dispatcher),
    _Job("mamba2_selective_state_update", kernels.HEAD_UPDATE, _update_dispatcher),
    _Job("causal_conv1d_fn", None, _convolution_dispatcher),
)
_FAMILIES = {  # the scan is the first job of each
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": _MAMBA,
    "zamba": (_SELECTIVE, _SELECTIVE_UPDATE),
    "mamba2": _MAMBA2,
    "bamba": _MAMBA2,
    "zamba2": _MAMBA2,
    "falcon_h1": _MAMBA2,
    "granitemoehybrid": _MAMBA2,
    "nemotron_h": _MAMBA2,
}


@dataclass
class _Patch:
    """What was replaced in one modeling file, to put it back."""

    module: ModuleType
    originals: dict[str, Any] = field(default_factory=dict)
    replacements: dict[str, Any] = field(default_factory=dict)


_PATCHES: dict[str, _Patch] = {}
_LOCK = threading.RLock()


def _enable_family(name: str, jobs: tuple[_Job, ...], devices: dict[_Job, frozenset[str]]) -> bool:
    """Replace the functions of one modeling file; return whether the fast scan runs on the current device type."""
    path = f"transformers.models.{name}.modeling_{name}"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        logger.info(f"{path} cannot be imported, so there is no scan to replace in it: {error}")
        return False
    missing = [job.name for job in jobs if not callable(getattr(module, job.name, None))]
    if missing:
        logger.warning(
            f"{path} has no {', '.join(missing)}: the fast scan is not enabled for it. This version of transformers "
            "is not known to hf_compressm; models run as they would without it."
        )
        return False
    patch = _Patch(module)
    for job in jobs:
        stock = getattr(module, job.name)
        replacement = job.dispatcher(stock, devices[job])
        if replacement is not stock:
            patch.originals[job.name], patch.replacements[job.name] = stock, replacement
            setattr(module, job.name, replacement)
    _PATCHES[path] = patch
    return kernels.device_types()[-1] not in devices[jobs[0]]
