"""Let stock transformers models run the fast selective scan wherever no working kernel is there.

transformers picks a scan when its modeling file is imported: mamba-ssm's function if that package can be imported,
else a loop over time that is correct and slow. It does not find out that mamba-ssm was installed without its CUDA
extension (the default since 2.3.2: the function imports, and raises when called), nor that the tensors are on the
CPU. Here the functions of a modeling file are replaced by dispatchers that decide per call, by device:

| word        | meaning                                                                             |
|-------------|-------------------------------------------------------------------------------------|
| stock       | the function of the modeling file as it was found, with whatever it dispatches to   |
| torch path  | the plain PyTorch function underneath it                                            |
| kernel      | mamba-ssm's function of the same job; it works on a device if a tiny call succeeds  |

A family is one row of `_FAMILIES`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging
from transformers.utils.import_utils import is_mambapy_available

from .selective import selective_scan


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Family:
    """The names by which one modeling file calls its scan, its fused layer and its single-step update."""

    module: str
    scan: str
    fused: str
    update: str


_FAMILIES = (
    _Family(
        module="transformers.models.mamba.modeling_mamba",
        scan="mamba_selective_scan",
        fused="mamba_inner_fn",
        update="mamba_selective_state_update",
    ),
)


@dataclass
class _Patch:
    """What was replaced in one modeling file, to put it back."""

    module: ModuleType
    originals: dict[str, Any] = field(default_factory=dict)
    replacements: dict[str, Any] = field(default_factory=dict)


_PATCHES: dict[str, _Patch] = {}
_LOCK = threading.RLock()


def enable_fast_selective_scan() -> bool:
    """Make stock Mamba models use `selective_scan` where no working kernel is there.

    Per call: a working kernel (mamba-ssm on this device, or one from the Hub that `use_kernels=True` put in place)
    runs untouched; `use_mambapy=True` is obeyed; while `torch.compile`, `torch.export` or `torch.jit.trace` look on,
    the stock PyTorch code runs; in all other cases `selective_scan` does. Results, dtypes and caches are those of the
    stock code. May be called any number of times; kernels are looked for anew each time. Undone by
    `disable_fast_selective_scan`.

    Returns:
        Whether stock models on the current accelerator (on the CPU if there is none) now run the fast scan: True in
        the absence of a working kernel, False with one, or if this version of transformers could not be recognised.
    """
    with _LOCK:
        disable_fast_selective_scan()
        in_use = [_enable_family(family) for family in _FAMILIES]
    return any(in_use)


def disable_fast_selective_scan() -> bool:
    """Put the functions that `enable_fast_selective_scan` replaced back.

    Returns:
        Whether the fast scan is in use now; always False.
    """
    with _LOCK:
        for name, patch in list(_PATCHES.items()):
            for attribute, replacement in patch.replacements.items():
                if getattr(patch.module, attribute, None) is replacement:
                    setattr(patch.module, attribute, patch.originals[attribute])
                else:
                    logger.warning(
                        f"{name}.{attribute} was replaced by somebody else in the meantime; it is left alone."
                    )
            del _PATCHES[name]
    return False


def _enable_family(family: _Family) -> bool:
    """Replace the functions of one modeling file; returns whether the fast scan runs on the current device type."""
    module = importlib.import_module(family.module)
    names = (family.scan, family.fused, family.update)
    missing = [name for name in names if not callable(getattr(module, name, None))]
    if missing:
        logger.warning(
            f"{family.module} has no {', '.join(missing)}: the fast selective scan is not enabled for it. This "
            "version of transformers is not known to hf_compressm; models run as they would without it."
        )
        return False
    stock = {name: getattr(module, name) for name in names}
    scan_devices = _working_devices("ops.selective_scan_interface", "selective_scan_fn", _scan_probe)
    fused_devices = _working_devices("ops.selective_scan_interface", "mamba_inner_fn", _fused_probe)
    update_devices = _working_devices("ops.triton.selective_state_update", "selective_state_update", _update_probe)
    patch = _Patch(module, originals=stock)
    patch.replacements[family.scan] = _scan_dispatcher(stock[family.scan], scan_devices)
    patch.replacements[family.fused] = _fused_dispatcher(stock[family.fused], fused_devices)
    if _is_kernel_installed():
        patch.replacements[family.update] = _update_dispatcher(stock[family.update], update_devices)
    for attribute, replacement in patch.replacements.items():
        setattr(module, attribute, replacement)
    _PATCHES[family.module] = patch
    return _device_types()[-1] not in scan_devices


def _scan_dispatcher(stock: Callable, kernel_devices: frozenset[str]) -> Callable:
    """The scan of a modeling file, with the fast scan in the place of its loop."""
    torch_path = _torch_path(stock)
    plain = torch_path if _is_kernel_installed() else stock

    @functools.wraps(torch_path)
    def dispatched_scan(
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
        use_mambapy: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        function = None
        if hidden_states.device.type in kernel_devices or _is_kernelized(stock):
            function = stock
        elif kwargs.get("cu_seqlens") is not None or kwargs.get("seq_idx") is not None:
            function = stock  # packed sequences need a kernel: the stock code says so
        elif _is_traced() or (use_mambapy and is_mambapy_available()):
            function = plain
        arguments = (hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
        if function is None:
            return _fast_scan(*arguments)
        names = ("D", "z", "delta_bias", "delta_softplus", "return_last_state")
        named = dict(zip(names, arguments[5:], strict=True))
        return function(*arguments[:5], **named, use_mambapy=use_mambapy, **kwargs)

    return dispatched_scan


def _fast_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, *rest: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in the dtype that the stock loop returns: D and z may lift it above that of u."""
    dtype = u.dtype
    for tensor in (D, z):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    result = selective_scan(u, delta, A, B, C, D, z, *rest)
    if isinstance(result, tuple):
        return result[0].to(dtype), result[1]
    return result.to(dtype)


def _fused_dispatcher(stock: Callable, kernel_devices: frozenset[str]) -> Callable:
    """The fused training layer: None, which means "not available, take the unfused path", without a working kernel."""

    @functools.wraps(_torch_path(stock))
    def dispatched_fused(projected_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if projected_states.device.type in kernel_devices or _is_kernelized(stock):
            return stock(projected_states, *args, **kwargs)
        return None

    return dispatched_fused


def _update_dispatcher(stock: Callable, kernel_devices: frozenset[str]) -> Callable:
    """The single-step update of generation: the torch path where an installed kernel does not work."""
    torch_path = _torch_path(stock)

    @functools.wraps(torch_path)
    def dispatched_update(state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        works = state.device.type in kernel_devices or _is_kernelized(stock)
        return (stock if works else torch_path)(state, *args, **kwargs)

    return dispatched_update


def _torch_path(stock: Callable) -> Callable:
    """The plain PyTorch function under transformers' and the kernels package's wrappers; `stock` where it has none."""
    if isinstance(stock, nn.Module):  # the kernels package turns a function into a module that closes over it
        forward = type(stock).forward
        stock = inspect.getclosurevars(forward).nonlocals.get("func", stock)
    return inspect.unwrap(stock)


def _is_kernelized(stock: Callable) -> bool:
    """Whether the kernels package has put a Hub kernel in the place of a function; it does so per instance."""
    return isinstance(stock, nn.Module) and "forward" in vars(stock)


def _is_traced() -> bool:
    """Whether somebody records the operations instead of only running them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _device_types() -> list[str]:
    """The device types to try kernels on: the CPU, then the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _is_kernel_installed() -> bool:
    """Whether mamba-ssm can be imported, which is when transformers binds to it."""
    try:
        importlib.import_module("mamba_ssm")
    except Exception:  # a package that is half there fails in many ways; transformers treats them all alike
        return False
    return True


def _working_devices(module: str, function: str, probe: Callable[[Callable, str], Any]) -> frozenset[str]:
    """The device types on which a tiny call of a mamba-ssm function succeeds."""
    if not _is_kernel_installed():
        return frozenset()
    try:
        kernel = getattr(importlib.import_module(f"mamba_ssm.{module}"), function)
    except Exception:  # as above: whatever fails, there is no kernel
        return frozenset()
    working = set()
    for device in _device_types():
        try:
            with torch.no_grad():
                probe(kernel, device)
            working.add(device)
        except Exception as error:  # a kernel may raise anything, assertions included
            logger.info(f"mamba-ssm's {function} does not work on {device}: {type(error).__name__}: {error}")
    return frozenset(working)


def _scan_probe(kernel: Callable, device: str) -> None:
    """One call of `selective_scan_fn` with 8 channels, 8 states, 8 steps."""
    square = torch.zeros(8, 8, device=device)
    cube = torch.zeros(1, 8, 8, device=device)
    kernel(cube, cube, square, cube, cube, delta_softplus=True)


def _fused_probe(kernel: Callable, device: str) -> None:
    """One call of `mamba_inner_fn` with 8 channels, 8 states, 8 steps, rank 1."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device)

    weights = (zeros(8, 1, 4), zeros(8), zeros(17, 8), zeros(8, 1), zeros(8, 8), None, zeros(8, 8))
    kernel(zeros(1, 16, 8), *weights, None, None, zeros(8), delta_bias=zeros(8), delta_softplus=True)


def _update_probe(kernel: Callable, device: str) -> None:
    """One call of `selective_state_update` with 8 channels and 8 states."""
    square, row = torch.zeros(8, 8, device=device), torch.zeros(1, 8, device=device)
    kernel(torch.zeros(1, 8, 8, device=device), row, row, square, row, row, dt_softplus=True)
