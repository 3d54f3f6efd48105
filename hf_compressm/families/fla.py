"""Linear attention of fla: `GatedDeltaNet`, `DeltaNet`, `KimiDeltaAttention` and `GatedLinearAttention`.

Symbols are those of `delta.py`. Their sizes are factors: a layer with fewer key channels has a larger `expand_v`, so
that its values stay, or a smaller `expand_k`. In Kimi delta attention every state decays by itself, and the rows of
`f_proj` go with their states; keys are apart from values here, so that no class of this package is needed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_compressm.families.delta import DeltaFamily
from hf_compressm.families.family import AttributeChange, CutMethod, LayerCut, Measurement, SSMLayer
from hf_compressm.families.layout import STATE, B, C, Layout, Part, rows
from hf_compressm.families.registry import register
from hf_compressm.families.sums import Statistics


@dataclass(frozen=True)
class FlaDeltaFamily(DeltaFamily):
    """Family of the delta nets of fla."""

    def attributes(self, module: Any, size: int, kept: Tensor) -> tuple[AttributeChange, ...]:
        """Those of the layout, and the widths of the short convolutions."""
        convolutions = [getattr(module, name) for name in ("q_conv1d", "k_conv1d") if hasattr(module, name)]
        widths = (AttributeChange(each, "hidden_size", module.num_heads * size) for each in convolutions)
        return (*super().attributes(module, size, kept), *widths)

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """As in other delta nets; a configuration that has `head_dim` has `expand_v` too."""
        cut = super().cut(layer, method, measurement, size)
        if self.size_field != "head_dim":
            return cut
        return replace(cut, config_fields={**cut.config_fields, "expand_v": _value_factor(layer.module, size)})

    def configured(self, module: Any, size: int) -> int | float:
        """`head_dim`, or the share of the hidden size that is `expand_k`."""
        return size if self.size_field == "head_dim" else _key_factor(module, size)


@dataclass(frozen=True)
class GatedLinearFamily(FlaDeltaFamily):
    """Family of gated linear attention, which erases nothing; every state decays by itself."""

    def problem(self, layer: SSMLayer, statistics: Statistics | None) -> str:
        """Why a layer cannot be measured, or ""."""
        if layer.module.num_kv_groups > 1:
            return "its heads share keys (num_kv_heads is below num_heads)"
        return super().problem(layer, statistics)


def _key_width(module: Any, size: int) -> int:
    return int(module.num_heads) * size


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
_PLAIN = Layout(
    "head_k_dim",
    _PROJECTIONS,
    output="o_proj",
    groups="num_heads",
    follows={"head_dim": _same, "key_dim": _key_width, "expand_v": _value_factor},
    others=(*_OTHERS, "v_conv1d.bias", "A_log", "dt_bias"),
)
_CONVOLVED = replace(_PLAIN, parts=(*_PROJECTIONS, rows("q_conv1d", C), rows("k_conv1d", B)))
_GATES = (Part("f_proj.1", 0, (STATE,), copies=_shared), Part("dt_bias", -1, (STATE,), copies=_shared))
_OF_GATED_LINEAR = (*_OTHERS, "v_conv1d.bias", "gk_proj.0.weight", "g_norm.weight", "g_norm_swish_gate.weight")
_OF_KIMI = (
    *_OTHERS,
    "v_conv1d.bias",
    "A_log",
    "f_proj.0.weight",
    "g_proj.0.weight",
    "g_proj.1.weight",
    "g_proj.1.bias",
)


def _of_deltanet(layout: Layout) -> Layout:
    return replace(layout, follows={"key_dim": _key_width, "expand_k": _key_factor})


def _of_kimi(layout: Layout) -> Layout:
    follows: Mapping[str, Any] = {**layout.follows, "gate_dim": _gate_width}
    return replace(layout, parts=(*layout.parts, *_GATES), follows=follows, others=_OF_KIMI)


def _of_gated_linear(layout: Layout) -> Layout:
    follows = {**_of_deltanet(layout).follows, "key_dim_per_group": _key_width}
    return replace(layout, parts=(*layout.parts, rows("gk_proj.1", STATE)), follows=follows, others=_OF_GATED_LINEAR)


_FAMILIES = (
    ("gated_deltanet", "fla.layers.gated_deltanet.GatedDeltaNet", "head_dim", _PLAIN, _CONVOLVED),
    ("delta_net", "fla.layers.delta_net.DeltaNet", "expand_k", _of_deltanet(_PLAIN), _of_deltanet(_CONVOLVED)),
    ("kda", "fla.layers.kda.KimiDeltaAttention", "head_dim", _of_kimi(_PLAIN), _of_kimi(_CONVOLVED)),
    (
        "gla",
        "fla.layers.gla.GatedLinearAttention",
        "expand_k",
        _of_gated_linear(_PLAIN),
        _of_gated_linear(_CONVOLVED),
    ),
)

for _family, _type, _field, *_layouts in _FAMILIES:
    for _mark, _layout in zip(("", "q_conv1d"), _layouts, strict=True):
        register(
            (GatedLinearFamily if _family == "gla" else FlaDeltaFamily)(
                name=_family,
                module_type=_type,
                size_field=_field,
                per_layer=False,
                criteria=("empirical",),
                tells_texts_apart_by=frozenset({"cu_seqlens"}),
                layout=_layout,
                mark=_mark,
                size_type=int if _field == "head_dim" else float,
                shares_field=True,
            )
        )
