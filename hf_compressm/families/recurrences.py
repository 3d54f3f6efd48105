"""The functions and modules that run a layer's recurrence, by dotted paths, and putting stand-ins in their places.

A module of Python that imported a function holds it under a name of its own, and so may a module of torch as an
attribute. Both are looked through, since a layer may call its recurrence by way of a helper in another file.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_compressm.families.calls import DELTA, DIAGONAL, GLA, MAMBA3, MLSTM, SELECTIVE, SSD
from hf_compressm.families.unfused import (
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_split_conv1d_scan_combined,
    not_available,
)
from hf_compressm.scans import selective_scan, ssd_scan


_INTERFACE, _COMBINED = "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.ssd_combined"
_MAMBA = ("mamba", "falcon_mamba", "jamba", "zamba")
_DELTA_NETS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "lara_mini", "olmo_hybrid")
_KIMI = ("kimi_linear", "bailing_hybrid", "glm5_next")
_MAMBA2 = ("mamba2", "bamba", "zamba2", "falcon_h1", "granitemoehybrid", "nemotron_h")


def _stock(names: tuple[str, ...], function: str) -> list[str]:
    return [f"transformers.models.{name}.modeling_{name}.{function}" for name in names]


RECURRENCES: dict[str, str] = {
    "hf_compressm.scans.selective.selective_scan": SELECTIVE,
    "hf_compressm.scans.selective.selective_scan_reference": SELECTIVE,
    "hf_compressm.scans.ssd.ssd_scan": SSD,
    "hf_compressm.scans.ssd.ssd_scan_reference": SSD,
    "hf_compressm.scans.diagonal.diagonal_scan": DIAGONAL,
    "hf_compressm.scans.diagonal.diagonal_scan_reference": DIAGONAL,
    f"{_INTERFACE}.selective_scan_fn": SELECTIVE,
    f"{_INTERFACE}.selective_scan_ref": SELECTIVE,
    f"{_COMBINED}.mamba_chunk_scan_combined": SSD,
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined.mamba3_siso_combined": MAMBA3,
    **dict.fromkeys(_stock(_MAMBA, "mamba_selective_scan"), SELECTIVE),
    **dict.fromkeys(_stock(_MAMBA2, "mamba2_chunk_scan"), SSD),
    **dict.fromkeys(_stock(_DELTA_NETS, "torch_chunk_gated_delta_rule"), DELTA),
    **dict.fromkeys(_stock(_KIMI, "chunk_kimi_delta_attention"), DELTA),
    "hf_compressm.scans.delta.delta_scan": DELTA,
    "hf_compressm.scans.delta.delta_scan_reference": DELTA,
    "fla.ops.gated_delta_rule.chunk.chunk_gated_delta_rule": DELTA,
    "fla.ops.gated_delta_rule.fused_recurrent.fused_recurrent_gated_delta_rule": DELTA,
    "fla.ops.delta_rule.chunk.chunk_delta_rule": DELTA,
    "fla.ops.delta_rule.fused_recurrent.fused_recurrent_delta_rule": DELTA,
    "fla.ops.kda.chunk.chunk_kda": DELTA,
    "fla.ops.kda.fused_recurrent.fused_recurrent_kda": DELTA,
    "fla.ops.gla.chunk.chunk_gla": GLA,
    "fla.ops.gla.fused_recurrent.fused_recurrent_gla": GLA,
}
"""The functions that are seen, each with the recurrence of this package that has its arguments."""
RECURRENT_MODULES: dict[str, str] = {
    "transformers.models.xlstm.modeling_xlstm.xLSTMBackend": MLSTM,
    "mlstm_kernels.torch.backend_module.mLSTMBackend": MLSTM,
}
"""Classes of modules whose forward is a recurrence: they hold its function where no name leads to it."""
FUSED: dict[str, Callable[..., Callable[..., Any]]] = {
    **dict.fromkeys(_stock(_MAMBA, "mamba_inner_fn"), lambda scans, heard: not_available),
    **dict.fromkeys(_stock(_MAMBA2, "mamba2_split_conv1d_scan_combined"), lambda scans, heard: not_available),
    f"{_INTERFACE}.mamba_inner_fn": lambda scans, heard: partial(mamba_inner_fn, scans[SELECTIVE], heard),
    f"{_INTERFACE}.mamba_inner_fn_no_out_proj": lambda scans, heard: partial(
        mamba_inner_fn_no_out_proj, scans[SELECTIVE]
    ),
    f"{_COMBINED}.mamba_split_conv1d_scan_combined": lambda scans, heard: partial(
        mamba_split_conv1d_scan_combined, scans[SSD], heard
    ),
}
"""Functions that do more than a recurrence, each with what makes its parts of scans, by kind, and a listener."""
_LOOKED_THROUGH = ("hf_compressm.scans.", "hf_compressm.families.")
"""Modules that keep the functions they hold: those of the functions themselves, and those that measure."""
_KNOWN = {"fla", "hf_compressm", "mamba_ssm", "peft", "torch", "transformers"}
"""Packages whose layers call functions that their own modules hold."""
_WITHOUT_LAYERS = sys.stdlib_module_names | {"torch", "transformers", "numpy", "scipy", "pandas", "pyarrow", "sympy"}


@contextmanager
def replaced(
    model: nn.Module,
    stand_in: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    heard: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Replace all known functions meanwhile, wherever a layer of the model may find them.

    Args:
        model: any module.
        stand_in: makes what takes the place of a function, of a kind of recurrence.
        heard: is given the input of an output projection inside a fused function, and its weight; returns the input.
    """
    wanted = {id(function): stand_in(kind, function) for kind, function in _found(RECURRENCES)}
    scans = {SELECTIVE: stand_in(SELECTIVE, selective_scan), SSD: stand_in(SSD, ssd_scan)}
    wanted |= {id(function): parts(scans, heard) for parts, function in _found(FUSED)}
    spaces = [vars(module) for module in _modules(model)] + [vars(module) for module in model.modules()]
    spaces += [_space(module) for module in model.modules()]
    distinct = {id(space): space for space in spaces}.values()
    holders = [space for space in distinct if not wanted.keys().isdisjoint(map(id, space.values()))]  # few
    places = [(held, name) for held in holders for name, value in held.items() if id(value) in wanted]
    originals = [held[name] for held, name in places]
    forwards = [(vars(module), stand_in(kind, module.forward)) for kind, module in _recurrent(model)]
    own = [held.get("forward") for held, _ in forwards]
    try:
        for (held, name), original in zip(places, originals, strict=True):
            held[name] = wanted[id(original)]
        for held, forward in forwards:
            held["forward"] = forward
        yield
    finally:
        for (held, _), before in zip(forwards, own, strict=True):
            held.pop("forward", None)
            held.update({} if before is None else {"forward": before})
        for (held, name), original in zip(places, originals, strict=True):
            held[name] = original


def _found(table: dict[str, Any]) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """The functions of a table whose modules are imported, each with its entry."""
    for path, entry in table.items():
        module, _, name = path.rpartition(".")
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            yield entry, function


def _recurrent(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model whose forward is a recurrence, each with its kind."""
    for module in model.modules():
        paths = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
        known = next((path for path in paths if path in RECURRENT_MODULES), None)
        if known is not None:
            yield RECURRENT_MODULES[known], module


def _modules(model: nn.Module) -> list[Any]:
    """The modules of Python that a layer of the model may call functions of: its own if it is known, else any."""
    own = {type(part).__module__ for part in model.modules()} | {path.rpartition(".")[0] for path in RECURRENCES}
    own |= {_space(part).get("__name__", "") for part in model.modules()}
    known = all(name.partition(".")[0] in _KNOWN for name in own)
    return [
        module
        for name, module in list(sys.modules.items())
        if module is not None
        and not f"{name}.".startswith(_LOOKED_THROUGH)
        and (name in own or not (known or name.partition(".")[0] in _WITHOUT_LAYERS))
        and isinstance(getattr(module, "__dict__", None), dict)
    ]


def _space(module: nn.Module) -> dict[str, Any]:
    """The names that the forward of a module finds."""
    forward = getattr(module.forward, "__func__", module.forward)
    return getattr(inspect.unwrap(forward), "__globals__", {})
