"""Blocks of vision models, whose files everybody copies: layouts to declare a class of any path with.

| layout | block | groups |
|---|---|---|
| VIM | Vision Mamba, second version (arXiv 2401.09417) | the two directions, each with parameters of its own |
| SS2D | VMamba's first version (arXiv 2401.10166), MambaIR (arXiv 2402.15648) | the four directions, stacked |

    declare_layer(models.vmamba.SS2D, SS2D)

VIM's layers are known by name in Vision Mamba's fork of mamba-ssm, SS2D's in MambaIR.
"""

from dataclasses import replace
from typing import Any

from hf_compressm.families.layout import Layout, rows, states
from hf_compressm.families.mamba import CRITERIA, MAMBA, OTHERS
from hf_compressm.families.registry import register
from hf_compressm.families.selective import SelectiveFamily


def _directions(module: Any) -> int:
    return int(module.x_proj_weight.shape[0])


VIM = Layout(
    state_size="d_state",
    parts=(*MAMBA, states("A_b_log", group=1), rows("x_proj_b", "*", "B", "C", folds=True, group=1)),
)
"""A second direction with its own `A_b_log` and `x_proj_b`, which keeps states of its own."""
SS2D = Layout(
    state_size="d_state",
    parts=(states("A_logs", by_group=True), rows("x_proj_weight", "*", "B", "C", folds=True, by_group=True)),
    groups=_directions,
)
"""`A_logs` (directions * channels, N) and `x_proj_weight` (directions, rank + 2 N, channels)."""
_SECOND = ("D_b", *(f"{name}_b.{own}" for name in ("conv1d", "dt_proj") for own in ("weight", "bias")))

register(
    SelectiveFamily(
        name="vim",
        module_type="mamba_ssm.modules.mamba_simple.Mamba",
        mark="D_b",  # the first version has A_b_log too, but only one projection
        size_field="d_state",
        per_layer=False,
        criteria=CRITERIA,
        layout=replace(VIM, others=(*OTHERS, *_SECOND, "gamma")),
    )
)
register(
    SelectiveFamily(
        name="ss2d",
        module_type="basicsr.archs.mambair_arch.SS2D",
        size_field="d_state",
        per_layer=False,
        criteria=CRITERIA,
        layout=SS2D,
    )
)
