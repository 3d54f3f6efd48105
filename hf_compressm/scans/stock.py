"""Fast scans for stock transformers models, wherever no kernel works.

transformers picks a scan when a modeling file is imported: the function of mamba-ssm or fla if that package can be
imported, else a plain PyTorch one that is correct and slow. It does not notice that mamba-ssm was installed without
its CUDA extension (the default since 2.3.2: the function imports, and raises when called), nor that the tensors are on
the CPU. Here the functions of the modeling files are replaced by those of `dispatchers.py`, which decide per call, by
device. A modeling file is one row of `_FAMILIES`. Its layers look the functions up by name at every call, so that
models made before and after are served alike.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from transformers.utils import logging

from . import kernels
from .dispatchers import (
    Job,
    convolution_dispatcher,
    fast_delta_scan,
    fast_selective_scan,
    fast_ssd_scan,
    fused_dispatcher,
    scan_dispatcher,
    update_dispatcher,
)
from .preference import beats_layer, beats_scan


logger = logging.get_logger(__name__)


def enable_fast_selective_scan() -> bool:
    """Make stock recurrent models, and the hybrids built on them, run the fast scans of this package.

    The families are Mamba, FalconMamba, Jamba and Zamba on `selective_scan`; Mamba2, Bamba, Zamba2, FalconH1,
    GraniteMoeHybrid and NemotronH on `ssd_scan`; and on `delta_scan` the gated delta nets Qwen3Next, Qwen3.5 (with
    experts too), Qwen4Exp, LaraMini and OlmoHybrid, and Kimi delta attention in KimiLinear, BailingHybrid and
    Glm5Next. On the CPU the short convolution in front of the scan is replaced too, but in Mamba-1 layouts. The
    modeling files are imported here, so this may be called before or after a model is made; one that this version of
    transformers does not have is passed over.

    The choice is made per call. A working kernel (mamba-ssm or fla on this device, or one from the Hub that
    `use_kernels=True` put in place) runs untouched, and `use_mambapy=True` is obeyed. The one exception is mamba-ssm's
    kernel for Mamba-1, in place of which the Triton kernels of this package run where they are measured faster. A
    kernel is tried when a layer first needs it, so that those of other families cost nothing.

    Under `torch.compile` the fast scan is an operator of the graph. Under `torch.jit.trace` and `torch.export` the
    stock PyTorch code runs, except for Mamba-1 layouts under `torch.export`: they run a scan that leaves the length
    open, which the stock code cannot. Inside a transform of `torch.func` the stock PyTorch code runs too. In all other
    cases the fast scan runs.
    Packed texts (`seq_idx`) are kept apart in all layouts but those of Mamba-1, where the stock code decides.
    Results, dtypes and caches are those of the stock code. This may be called any number of times, and tries
    the kernels of other packages anew each time; `disable_fast_selective_scan` undoes it.

    Returns:
        Whether the functions of any modeling file are replaced now; False if this version of transformers is not
        recognised.
    """
    with _LOCK:
        disable_fast_selective_scan()
        kernels.forget_trials()
        for name, jobs in _FAMILIES.items():
            _enable_family(name, jobs)
    return bool(_PATCHES)


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


@contextmanager
def fast_scans() -> Iterator[None]:
    """Run the fast scans meanwhile; where they were enabled before, they stay so."""
    with _LOCK:
        were_enabled = bool(_PATCHES)
        if not were_enabled:
            enable_fast_selective_scan()
    try:
        yield
    finally:
        if not were_enabled:
            disable_fast_selective_scan()


_SELECTIVE = Job(
    "mamba_selective_scan",
    kernels.SELECTIVE_SCAN,
    functools.partial(
        scan_dispatcher, fast=fast_selective_scan, can_be_exported=True, keeps_apart=False, beats=beats_scan
    ),
)
_SELECTIVE_FUSED = Job("mamba_inner_fn", kernels.INNER, functools.partial(fused_dispatcher, beats=beats_layer))
_SELECTIVE_UPDATE = Job("mamba_selective_state_update", kernels.CHANNEL_UPDATE, update_dispatcher)
_CONVOLUTION = Job("causal_conv1d_fn", None, convolution_dispatcher)
_MAMBA = (_SELECTIVE, _SELECTIVE_FUSED, _SELECTIVE_UPDATE)
_MAMBA2 = (
    Job(
        "mamba2_chunk_scan",
        kernels.CHUNK_SCAN,
        # The stock code can be exported.
        functools.partial(scan_dispatcher, fast=fast_ssd_scan, can_be_exported=False, keeps_apart=True),
    ),
    Job("mamba2_split_conv1d_scan_combined", kernels.SPLIT_SCAN, fused_dispatcher),
    Job("mamba2_selective_state_update", kernels.HEAD_UPDATE, update_dispatcher),
    _CONVOLUTION,
)
_DELTA_DISPATCHER = functools.partial(
    scan_dispatcher, fast=fast_delta_scan, can_be_exported=False, keeps_apart=True, package="fla"
)
_DELTA_UPDATE_DISPATCHER = functools.partial(update_dispatcher, package="fla")
_GATED_DELTA_NET = (
    Job("torch_chunk_gated_delta_rule", kernels.GATED_DELTA_RULE, _DELTA_DISPATCHER),
    Job("torch_recurrent_gated_delta_rule", kernels.GATED_DELTA_UPDATE, _DELTA_UPDATE_DISPATCHER),
    _CONVOLUTION,
)
_KIMI_DELTA_ATTENTION = (
    Job("chunk_kimi_delta_attention", kernels.KIMI_DELTA_ATTENTION, _DELTA_DISPATCHER),
    Job("recurrent_kimi_delta_attention", kernels.KIMI_DELTA_UPDATE, _DELTA_UPDATE_DISPATCHER),
    _CONVOLUTION,
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
    "qwen3_next": _GATED_DELTA_NET,
    "qwen3_5": _GATED_DELTA_NET,
    "qwen3_5_moe": _GATED_DELTA_NET,
    "qwen4_exp": _GATED_DELTA_NET,
    "lara_mini": _GATED_DELTA_NET,
    "olmo_hybrid": _GATED_DELTA_NET,
    "kimi_linear": _KIMI_DELTA_ATTENTION,
    "bailing_hybrid": _KIMI_DELTA_ATTENTION,
    "glm5_next": _KIMI_DELTA_ATTENTION,
}


@dataclass
class _Patch:
    """What was replaced in one modeling file, to put it back."""

    module: ModuleType
    originals: dict[str, Any] = field(default_factory=dict)
    replacements: dict[str, Any] = field(default_factory=dict)


_PATCHES: dict[str, _Patch] = {}
_LOCK = threading.RLock()


def _enable_family(name: str, jobs: tuple[Job, ...]) -> None:
    """Replace the functions of one modeling file."""
    path = f"transformers.models.{name}.modeling_{name}"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        logger.info(f"{path} cannot be imported, so there is no scan to replace in it: {error}")
        return
    missing = [job.name for job in jobs if not callable(getattr(module, job.name, None))]
    if missing:
        logger.warning(
            f"{path} has no {', '.join(missing)}: the fast scan is not enabled for it. This version of transformers "
            "is not known to hf_compressm; models run as they would without it."
        )
        return
    patch = _Patch(module)
    for job in jobs:
        stock = getattr(module, job.name)
        replacement = job.dispatcher(stock, kernels.tester(job.kernel))
        if replacement is not stock:
            patch.originals[job.name], patch.replacements[job.name] = stock, replacement
            setattr(module, job.name, replacement)
    _PATCHES[path] = patch
