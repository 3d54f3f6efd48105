"""Mamba-1 layers of transformers, mamba-ssm and fla: states are selected, dropped ones read out of the kept ones.

| symbol | meaning | shape |
|---|---|---|
| u | scan input after the convolution | `(batch, channels, length)` |
| Delta | step size, softplus of its projection | `(batch, channels, length)` |
| A | continuous-time decay, `-exp(A_log)` | `(channels, N)` |
| B, C | input and read-out, shared by the channels of a group | `(batch, groups, N, length)` |

Discrete time, `h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t`, `y_t = C_t . h_t`. Mamba has one group, Zamba one for
each of its heads. One set of state indices per group keeps every stock kernel and class usable; see
`numerics.interpolation`.
"""

from hf_compressm.families.layout import Layout, rows, states
from hf_compressm.families.registry import register
from hf_compressm.families.selective import SelectiveFamily


CRITERIA = ("interpolative", "surrogate", "fisher")
OTHERS = (
    "D",
    "in_proj.weight",
    "in_proj.bias",
    "conv1d.weight",
    "conv1d.bias",
    "dt_proj.weight",
    "dt_proj.bias",
    "out_proj.weight",
    "out_proj.bias",
)
MAMBA = (states("A_log"), rows("x_proj", "*", "B", "C", folds=True))

_ZAMBA = Layout(
    "ssm_state_size",
    (states("A_log", by_group=True), rows("x_proj_weight", "*", "B", "C", folds=True, by_group=True)),
    groups="n_mamba_heads",
    others=(*OTHERS, "dt_proj_weight", "dt_proj_bias"),
)
_STOCK, _OWN = Layout("ssm_state_size", MAMBA, others=OTHERS), Layout("d_state", MAMBA, others=OTHERS)

for _family, _type, _field, _layout in (
    ("mamba", "transformers.models.mamba.modeling_mamba.MambaMixer", "state_size", _STOCK),
    ("mamba", "mamba_ssm.modules.mamba_simple.Mamba", "d_state", _OWN),
    ("mamba", "fla.layers.mamba.Mamba", "state_size", _STOCK),
    ("zamba", "transformers.models.zamba.modeling_zamba.ZambaMambaMixer", "mamba_d_state", _ZAMBA),
):
    register(
        SelectiveFamily(
            name=_family, module_type=_type, size_field=_field, per_layer=False, criteria=CRITERIA, layout=_layout
        )
    )
