"""Linear attention of flash-linear-attention: delta nets, and gated linear attention (GLA).

| layer | S before the input | queries and keys come from | size |
|---|---|---|---|
| `GatedDeltaNet` | one decay per value head | convolution, SiLU, L2 norm | `head_dim`, `expand_v` |
| `DeltaNet` | no decay | convolution, activation, L2 or L1 norm | `expand_k` |
| `KimiDeltaAttention` | one decay per state, from `f_proj` | convolution, SiLU, L2 norm | `head_dim`, `expand_v` |
| `GatedLinearAttention` | one decay per state, from `gk_proj`; nothing is erased | projections | `expand_k` |

Other symbols are those of `delta.py`. Sizes are factors: a layer with fewer key channels has a larger `expand_v`, so
that its values stay, or a smaller `expand_k`. Keys are apart from values here, so that Kimi delta attention needs no
class of this package; the rows that make decays go with their states. In GLA nothing but linear maps stands between
`q_proj` and the recurrence, unless there is a convolution or a feature map: what dropped states did is interpolated
from the kept ones and folded into the queries, with a factor `sqrt(r / N)` that makes up for the scale of the
read-out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from hf_compressm.families.changes import AttributeChange, ParameterChange
from hf_compressm.families.delta import DeltaFamily
from hf_compressm.families.family import SSMLayer
from hf_compressm.families.layout import STATE, B, C, Layout, Part, rows
from hf_compressm.families.registry import register
from hf_compressm.families.selective import Selection


@dataclass(frozen=True)
class FlaFamily(DeltaFamily):
    """Family of the layers of fla whose states are matrices.

    Attributes:
        caches_values_first: whether a cached state is `(batch, value heads, P, N)`.
    """

    caches_values_first: bool = True

    def attributes(self, module: Any, size: int, kept: Tensor) -> tuple[AttributeChange, ...]:
        """Those of the layout, and the widths of the short convolutions."""
        convolutions = [getattr(module, name) for name in ("q_conv1d", "k_conv1d") if hasattr(module, name)]
        present = self.state_size(module)
        widths = (AttributeChange(each, "hidden_size", each.hidden_size // present * size) for each in convolutions)
        return (*super().attributes(module, size, kept), *widths)

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """As in all layouts; where read-outs are folded, queries make up for the scale of the smaller recurrence."""
        changes = super().changes(layer, kept, R, selection)
        if not self.reads_out:
            return changes
        scale = math.sqrt(kept.shape[1] / R.shape[1])
        q_proj = layer.module.q_proj.weight
        return tuple(_scaled(change, scale) if change.parameter is q_proj else change for change in changes)

    def configured(self, module: Any, size: int) -> Mapping[str, int | float]:
        """`head_dim`, and `expand_v` with it; or `expand_k`, the share of the hidden size."""
        if self.size_field == "expand_k":
            return {"expand_k": _key_factor(module, size)}
        return {"head_dim": size, "expand_v": _value_factor(module, size)}

    def cached_sizes(self, module: Any, given: Sequence[Any]) -> Iterator[int]:
        """What the state of the layer in a cache of fla holds, in the present or the older class."""
        cache: Any = next((value for value in given if isinstance(value, Cache)), None)
        index = module.layer_idx
        if cache is None or index is None:
            return
        held = getattr(cache, "states", None) or [getattr(each, "state", None) for each in cache.layers]
        for state in held[index : index + 1]:
            matrix = (state or {}).get("recurrent_state")
            if isinstance(matrix, Tensor):
                yield matrix.shape[-1 if self.caches_values_first else -2]


def _scaled(change: ParameterChange, scale: float) -> ParameterChange:
    """A change of queries times a number, by which their gradients are divided."""
    moments = tuple(replace(term, matrix=term.matrix / scale) for term in change.moments)
    if change.row_map is None:
        return replace(change, value=change.value * scale, moments=moments)
    return ParameterChange.mapped(change.name, change.parameter, change.row_map * scale, 0, moments)


def _key_width(module: Any, size: int) -> int:
    return int(module.num_heads) * size


def _shared_key_width(module: Any, size: int) -> int:
    return int(module.num_kv_heads) * size


def _gate_width(module: Any, size: int) -> int:
    return int(module.num_v_heads) * size


def _value_factor(module: Any, size: int) -> float:
    """`expand_v`, of which a layer takes `int(head_dim * expand_v)`."""
    factor = int(module.head_v_dim) / size
    return factor if int(size * factor) == module.head_v_dim else math.nextafter(factor, math.inf)


def _key_factor(module: Any, size: int) -> float:
    """`expand_k`, of which a layer takes `round(hidden_size * expand_k)`."""
    return _key_width(module, size) / int(module.hidden_size)


def _same(module: Any, size: int) -> int:
    return size


def _shared(module: Any) -> int:
    """Value heads of one key head."""
    return int(module.num_v_heads) // int(module.num_heads)


_OTHERS = tuple(f"{name}.weight" for name in ("v_proj", "v_conv1d", "a_proj", "b_proj", "g_proj", "o_norm", "o_proj"))
_PROJECTIONS = (rows("q_proj", C), rows("k_proj", B))
_CONVOLUTIONS = (rows("q_conv1d", C), rows("k_conv1d", B))
_GATED = Layout(
    "head_k_dim",
    _PROJECTIONS,
    output="o_proj",
    groups="num_heads",
    follows={"head_dim": _same, "key_dim": _key_width, "expand_v": _value_factor},
    others=(*_OTHERS, "v_conv1d.bias", "A_log", "dt_bias"),
)
_DELTA = replace(_GATED, follows={"key_dim": _key_width, "expand_k": _key_factor})
_KIMI = replace(
    _GATED,
    parts=(
        *_PROJECTIONS,
        Part("f_proj.1", 0, (STATE,), copies=_shared),
        Part("dt_bias", -1, (STATE,), copies=_shared),
    ),
    follows={**_GATED.follows, "gate_dim": _gate_width},
    others=(
        *_OTHERS,
        *("v_conv1d.bias", "A_log", "f_proj.0.weight"),
        *("g_proj.0.weight", "g_proj.1.weight", "g_proj.1.bias"),
    ),
)
_READS = Part("q_proj", 0, (C,), copies="num_kv_groups")
_DECAYS = Part("gk_proj.1", 0, (STATE,))
_GLA = Layout(
    "head_k_dim",
    (_READS, rows("k_proj", B), _DECAYS),
    output="o_proj",
    groups="num_kv_heads",
    readers="num_kv_groups",
    follows={"key_dim": _key_width, "key_dim_per_group": _shared_key_width, "expand_k": _key_factor},
    others=(
        *(f"{name}.weight" for name in ("v_proj", "v_conv1d", "gk_proj.0", "g_proj", "o_proj")),
        *("v_conv1d.bias", "g_norm.weight", "g_norm_swish_gate.weight"),
    ),
)
_FOLDING_GLA = replace(_GLA, parts=(replace(_READS, folds=True), rows("k_proj", B, folds=True), _DECAYS))
_CONVOLVED_GLA = replace(_GLA, parts=(*_GLA.parts, replace(_READS, name="q_conv1d"), rows("k_conv1d", B)))


def _convolved(layout: Layout) -> Layout:
    return replace(layout, parts=(*layout.parts, *_CONVOLUTIONS))


_FAMILIES = (
    ("gated_deltanet", "gated_deltanet.GatedDeltaNet", "head_dim", {"": _GATED, "q_conv1d": _convolved(_GATED)}),
    ("delta_net", "delta_net.DeltaNet", "expand_k", {"": _DELTA, "q_conv1d": _convolved(_DELTA)}),
    ("kda", "kda.KimiDeltaAttention", "head_dim", {"": _KIMI, "q_conv1d": _convolved(_KIMI)}),
    (
        "gla",
        "gla.GatedLinearAttention",
        "expand_k",
        {"": _FOLDING_GLA, "q_conv1d": _CONVOLVED_GLA, "feature_map_fn": _GLA},
    ),
)

for _family, _type, _field, _layouts in _FAMILIES:
    for _mark, _layout in _layouts.items():
        register(
            FlaFamily(
                name=_family,
                module_type=f"fla.layers.{_type}",
                size_field=_field,
                per_layer=False,
                criteria=("interpolative" if _layout.folds else "empirical", "fisher"),
                tells_texts_apart_by=frozenset({"cu_seqlens"}),
                layout=_layout,
                mark=_mark,
                size_type=int if _field == "head_dim" else float,
                shares_field=True,
                caches_values_first=_family != "delta_net",
            )
        )
