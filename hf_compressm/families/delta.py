"""Delta nets: the state of a value head is a matrix, and a cut takes rows of it, channels of queries and keys.

| symbol | meaning | shape |
|---|---|---|
| N | channels of a key head, `linear_key_head_dim` | |
| k, q | key and query, of length 1 | `(batch, length, key heads, N)` |
| v | value | `(batch, length, value heads, P)` |
| S | state of a value head | `(N, P)` |
| g, beta | log decay and step, one of each per value head | `(batch, length, value heads)` |

    S_t = exp(g_t) S_{t-1},  S_t += beta_t k_t (v_t - S_t^T k_t)^T,  o_t = S_t^T q_t / sqrt(N)

Source: Gated Delta Networks, arXiv 2412.06464, equation 10. Queries and keys come out of a convolution, SiLU and an L2
norm, so nothing can be folded into them: a stock layer keeps some of its channels, the same ones for queries and keys.
A layer of this package's classes projects them behind the norm, see `delta_projected.py`.
The channels of a key head are read out by all of its value heads. They are kept by elimination on what their read-outs
`q_i S[i, :]` add to the layer's output together, `M` in `selective.py`. What remains of norm and erase term is not in
that: the error is told by running the cut layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hf_compressm.families.delta_projected import ProjectingFamily
from hf_compressm.families.layout import B, C, Layout, Part, rows
from hf_compressm.families.registry import register


@dataclass(frozen=True)
class DeltaFamily(ProjectingFamily):
    """Family of the gated delta nets of transformers and fla."""

    def state_entries(self, module: Any) -> int:
        """One matrix for each value head."""
        return self.state_size(module) * int(module.value_dim)


def _key_width(module: Any, size: int) -> int:
    return int(module.num_k_heads) * size


def _convolved_width(module: Any, size: int) -> int:
    return 2 * _key_width(module, size) + int(module.value_dim)


_FOLLOWS: dict[str, Callable[[Any, int], int | float]] = {"key_dim": _key_width, "conv_dim": _convolved_width}
_CONVOLUTION = rows("conv1d", C, B, "value_dim")
_HEADS = ("A_log", "dt_bias", "norm.weight", "out_proj.weight")


def _grouped(module: Any) -> int:
    """Rows of values and gates of one key head."""
    return 2 * int(module.value_dim) // int(module.num_k_heads)


_SPLIT = Layout(
    "head_k_dim",
    (rows("in_proj_qkv", C, B, "value_dim"), _CONVOLUTION),
    groups="num_k_heads",
    follows=_FOLLOWS,
    others=(*_HEADS, "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight"),
)
_INTERLEAVED = replace(
    _SPLIT,
    parts=(Part("in_proj_qkvz", 0, (C, B, _grouped), interleaved=True), _CONVOLUTION),
    others=(*_HEADS, "in_proj_ba.weight"),
)
_SEPARATE = replace(
    _SPLIT,
    parts=(rows("q_proj", C), rows("k_proj", B), _CONVOLUTION),
    output="o_proj",
    others=(
        "A_log",
        "dt_bias",
        *(f"{name}.weight" for name in ("v_proj", "a_proj", "b_proj", "g_proj", "o_norm", "o_proj")),
    ),
)
_FAMILIES = (
    ("qwen3_next", "Qwen3NextGatedDeltaNet", _INTERLEAVED),
    ("qwen3_5", "Qwen3_5GatedDeltaNet", _SPLIT),
    ("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", _SPLIT),
    ("qwen4_exp", "Qwen4ExpTextGatedDeltaNet", _SPLIT),
    ("lara_mini", "LaraMiniGatedDeltaNet", _SPLIT),
    ("olmo_hybrid", "OlmoHybridGatedDeltaNet", _SEPARATE),
)

for _family, _class, _layout in _FAMILIES:
    register(
        DeltaFamily(
            name=_family,
            module_type=f"transformers.models.{_family}.modeling_{_family}.{_class}",
            size_field="linear_key_head_dim",
            per_layer=False,
            criteria=("empirical", "fisher"),
            layout=_layout,
        )
    )
