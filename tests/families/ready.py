"""Every layer that is declared already, as its stand-in: one table feeds the laws.

A layer of another path than its package's is declared with one of the constants.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm.families import SS2D, VIM, Layout, declare_layer, registry
from hf_compressm.scans import selective_scan
from tests import blocks
from tests.blocks import (
    FlaMamba,
    FlaMamba2,
    Mamba,
    Mamba2,
    Mamba2Simple,
    Mamba3,
    OffsetVim,
    Vim,
    at_path,
    fla_delta,
    fla_gla,
    fused,
)
from tests.blocks import mamba3 as mamba3_blocks
from tests.blocks import mamba_ssm as mamba_ssm_blocks


WIDTH = 6
Fork = at_path(Vim, "mamba_ssm.modules.mamba_simple.Mamba")
OffsetFork = at_path(OffsetVim, "mamba_ssm.modules.mamba_simple.Mamba")
Copied = at_path(Vim, "somewhere.models.BidirectionalMamba")
OfMambaIR = at_path(blocks.SS2D, "basicsr.archs.mambair_arch.SS2D")
OfVMamba = at_path(blocks.SS2D, "models.vmamba.SS2D")
DECLARED: dict[type[nn.Module], Layout] = {Copied: VIM, OfVMamba: SS2D}
"""Classes that no family knows, and the constants to declare them with."""


GatedDeltaNet = at_path(fla_delta.FlaGatedDeltaNet, "fla.layers.gated_deltanet.GatedDeltaNet")
DeltaNet = at_path(fla_delta.FlaDeltaNet, "fla.layers.delta_net.DeltaNet")
KimiDeltaAttention = at_path(fla_delta.FlaKimiDeltaAttention, "fla.layers.kda.KimiDeltaAttention")
GatedLinearAttention = at_path(fla_gla.FlaGatedLinearAttention, "fla.layers.gla.GatedLinearAttention")


@dataclass(frozen=True)
class Row:
    """One kind of layer.

    Attributes:
        build: makes a layer of N states.
        family: the name of its family.
        size: N before a cut.
        smaller: N after it.
        calls: how many calls of recurrences it makes.
    """

    build: Callable[[int], nn.Module]
    family: str
    size: int = 6
    smaller: int = 4
    calls: int = 1


READY: dict[str, Row] = {
    "vim": Row(lambda N: Fork(WIDTH, N, dt_rank=2), "vim", calls=2),
    "vim, halved": Row(lambda N: Fork(WIDTH, N, dt_rank=2, if_devide_out=True), "vim", calls=2),
    "vim in two calls": Row(lambda N: Fork(WIDTH, N, dt_rank=2, use_fast_path=False), "vim", calls=2),
    "vim with a bias": Row(lambda N: OffsetFork(WIDTH, N, dt_rank=2), "vim", calls=2),
    "vim, declared": Row(lambda N: Copied(WIDTH, N, dt_rank=2), "bidirectionalmamba", calls=2),
    "ss2d": Row(lambda N: OfMambaIR(WIDTH, N, dt_rank=2, keeps_scan=True), "ss2d"),
    "ss2d, declared": Row(lambda N: OfVMamba(WIDTH, N, dt_rank=2), "ss2d"),
    "mamba": Row(lambda N: Mamba(WIDTH, N, dt_rank=2, bias=True), "mamba"),
    "mamba without its fast path": Row(lambda N: Mamba(WIDTH, N, dt_rank=2, use_fast_path=False), "mamba"),
    "mamba2": Row(lambda N: Mamba2(WIDTH, N, headdim=3, ngroups=2, bias=True), "mamba2"),
    "mamba2, gate after norm": Row(
        lambda N: Mamba2(WIDTH, N, headdim=3, norm_before_gate=True, dt_limit=(0.01, 0.05)), "mamba2"
    ),
    "mamba2 beside an mlp": Row(
        lambda N: Mamba2(WIDTH, N, headdim=3, d_ssm=6, D_has_hdim=True, rmsnorm=False), "mamba2"
    ),
    "mamba2 by its parts": Row(lambda N: Mamba2(WIDTH, N, headdim=3, d_ssm=6, use_mem_eff_path=False), "mamba2"),
    "mamba2simple": Row(lambda N: Mamba2Simple(WIDTH, N, headdim=3), "mamba2"),
    "mamba2simple with a first state": Row(
        lambda N: Mamba2Simple(WIDTH, N, headdim=3, ngroups=2, learnable_init_states=True), "mamba2"
    ),
    "mamba of fla": Row(lambda N: FlaMamba(WIDTH, N), "mamba"),
    "mamba2 of fla": Row(lambda N: FlaMamba2(head_dim=3, hidden_size=WIDTH, state_size=N, n_groups=2), "mamba2"),
    "gated deltanet of fla": Row(lambda N: GatedDeltaNet(WIDTH, N, 12 / N, num_v_heads=4), "gated_deltanet"),
    "gated deltanet of fla, plain": Row(
        lambda N: GatedDeltaNet(WIDTH, N, 12 / N, use_short_conv=False, allow_neg_eigval=True), "gated_deltanet"
    ),
    "deltanet of fla": Row(lambda N: DeltaNet(WIDTH, 2 * N / WIDTH), "delta_net"),
    "deltanet of fla, plain": Row(
        lambda N: DeltaNet(WIDTH, 2 * N / WIDTH, use_short_conv=False, qk_norm="sum"), "delta_net"
    ),
    "kda of fla": Row(lambda N: KimiDeltaAttention(WIDTH, N, 12 / N, num_v_heads=4), "kda"),
    "kda of fla, bounded": Row(
        lambda N: KimiDeltaAttention(WIDTH, N, 12 / N, use_short_conv=False, lower_bound=-5.0), "kda"
    ),
    "gla of fla": Row(lambda N: GatedLinearAttention(WIDTH, 2 * N / WIDTH), "gla"),
    "gla of fla, keys shared": Row(
        lambda N: GatedLinearAttention(WIDTH, 4 * N / WIDTH, num_heads=4, num_kv_heads=2), "gla"
    ),
    "gla of fla, convolved": Row(
        lambda N: GatedLinearAttention(WIDTH, 4 * N / WIDTH, num_heads=4, num_kv_heads=2, use_short_conv=True), "gla"
    ),
    "gla of fla, mapped": Row(lambda N: GatedLinearAttention(WIDTH, 2 * N / WIDTH, feature_map=F.elu), "gla"),
    "mamba3": Row(lambda N: Mamba3(WIDTH, N, headdim=3, ngroups=2), "mamba3", 12, 8),
    "mamba3, all pairs turning": Row(
        lambda N: Mamba3(WIDTH, N, headdim=3, rope_fraction=1.0, is_outproj_norm=True), "mamba3", 8, 6
    ),
    "mamba3 of an odd number of pairs": Row(lambda N: Mamba3(WIDTH, N, headdim=3), "mamba3", 10, 4),
}
INTERFACE, COMBINED = "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.ssd_combined"
SISO = "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined"
PACKAGE: dict[str, dict[str, Any]] = {
    INTERFACE: {
        "selective_scan_fn": selective_scan,
        "mamba_inner_fn": fused.mamba_inner_fn,
        "mamba_inner_fn_no_out_proj": fused.mamba_inner_fn_no_out_proj,
    },
    COMBINED: {
        "mamba_chunk_scan_combined": mamba_ssm_blocks.mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": fused.mamba_split_conv1d_scan_combined,
    },
    SISO: {"mamba3_siso_combined": mamba3_blocks.mamba3_siso_combined},
    "fla.ops.gated_delta_rule.chunk": {"chunk_gated_delta_rule": fla_delta.chunk_gated_delta_rule},
    "fla.ops.delta_rule.chunk": {"chunk_delta_rule": fla_delta.chunk_delta_rule},
    "fla.ops.kda.chunk": {"chunk_kda": fla_delta.chunk_kda},
    "fla.ops.gla.chunk": {"chunk_gla": fla_gla.chunk_gla},
}
"""Modules of mamba-ssm and fla, with the functions that the stand-ins call."""


@contextmanager
def as_installed() -> Iterator[None]:
    """Mamba-ssm's functions are where the package has them, and the classes of the table are declared.

    One thread: tensors are so small that threads would wait for each other most of the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    families = {path: dict(known) for path, known in registry._FAMILIES.items()}
    modules = {name: sys.modules.get(name) for name in PACKAGE}
    try:
        for name, functions in PACKAGE.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(functions)
        for kind, layout in DECLARED.items():
            declare_layer(kind, layout)
        yield
    finally:
        torch.set_num_threads(threads)
        registry._FAMILIES.clear()
        registry._FAMILIES.update(families)
        for name, module in modules.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


class Stack(nn.Module):
    """Layers one after the other, each beside what it is given."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            result = layer(hidden)
            hidden = hidden + (result[0] if isinstance(result, tuple) else result)
        return hidden


def built(row: Row, size: int | None = None, layers: int = 1) -> Stack:
    """Layers of a row whose parameters are not as they are initialised."""
    model = Stack([row.build(size or row.size) for _ in range(layers)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(model: nn.Module, rows: int = 3) -> dict[str, Tensor]:
    """Pictures or sequences."""
    is_vision = any(isinstance(layer, blocks.SS2D) for layer in model.modules())
    return {"hidden": torch.randn(rows, 3, 4, WIDTH) if is_vision else torch.randn(rows, 13, WIDTH)}
