"""Kimi delta attention: a delta net whose decay differs from state to state, so that a cut selects channels.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(N)

Source: Kimi Linear, arXiv 2510.26692, equation 1. Symbols are those of `delta.py`, and g is
`(batch, length, heads, N)`. Nothing but a selection of states commutes with the decay. A stock layer has no state
size of its own, since `linear_head_dim` is also the width of its values and the bottleneck of its gates: only a layer
of this package's classes is cut. Its projection behind the L2 norm begins as a selection, and the forget gate keeps
the rows of the channels that stay.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.changes import AttributeChange, MomentTerm, ParameterChange
from hf_compressm.families.delta_projected import PROJECTION, Directions, ProjectingFamily
from hf_compressm.families.family import CutMethod, LayerCut, LayerShape, Measurement, SSMLayer
from hf_compressm.families.layout import B, C, Layout, rows
from hf_compressm.families.registry import register
from hf_compressm.families.selective import parameter_name, unmeasurable
from hf_compressm.families.sums import Statistics


@dataclass(frozen=True)
class KimiFamily(ProjectingFamily):
    """Family of the Kimi delta attention of transformers, and of this package's classes."""

    def fitted(self, module: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The projection, and the rows of the forget gate."""
        gate = module.forget_gate
        for tensor in (module.state_proj, getattr(gate, _gate_projection(module)).weight, gate.dt_bias):
            yield tensor, torch.ones_like(tensor)

    def state_entries(self, module: Any) -> int:
        """One matrix for each head."""
        return self.state_size(module) * int(module.qkv_dim)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the order in which channels are kept; a stock layer that stays one keeps all."""
        if not self.projects(layer, method):
            return unmeasurable(
                layer,
                "linear_head_dim is the width of its keys, values and gates at once, so a stock layer cannot have "
                'fewer states; use compat="best"',
            )
        return super().measure(layer, method, statistics)

    def projected(
        self, layer: SSMLayer, method: CutMethod, statistics: Statistics, selecting: Measurement
    ) -> Measurement:
        """That of the selection."""
        P, Q, K = (statistics.mean(name) for name in ("P", "Q", "K"))
        bases = torch.eye(P.shape[1], dtype=torch.float64)[selecting.detail.orders]
        return replace(selecting, detail=Directions(bases, P, Q, K, refines=False))

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Select `size` states of every head, and their rows of the forget gate."""
        found: Directions = measurement.detail
        kept = found.bases[:, :size].argmax(dim=-1).sort(dim=-1).values
        chosen = found.bases.new_zeros(*kept.shape, found.bases.shape[2]).scatter_(2, kept[..., None], 1.0)
        ordered = replace(measurement, detail=replace(found, bases=chosen))
        cut = super().cut(layer, method, ordered, size)
        gate = _gate_changes(layer, kept)
        return replace(
            cut,
            changes=(*cut.changes, *gate),
            attributes=_gate_attributes(layer.module, size),
            predicted_error=float(measurement.errors[size]),
        )

    def config_fields(self, layer: SSMLayer, size: int) -> dict[str, int]:
        """The size has a field of its own, and the width stays."""
        return {"linear_head_dim": self.width(layer.module), "linear_key_head_dim": size}

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """The projection of the forget gate, and its bias."""
        return f"forget_gate.{_gate_projection(layer.module)}", "forget_gate.dt_bias"

    def state_axes(self, module: Any) -> Mapping[str, int | None]:
        """Those of queries and keys, and of the forget gate."""
        gate = f"forget_gate.{_gate_projection(module)}.weight"
        return {**super().state_axes(module), gate: 0, "forget_gate.dt_bias": 0}

    def at_size(self, module: Any, size: int) -> LayerShape:
        """What a layer would look like: besides its projection, the forget gate changes."""
        shape, gate = super().at_size(module, size), f"forget_gate.{_gate_projection(module)}.weight"
        if getattr(module, PROJECTION, None) is None:
            return shape
        height, width = module.num_heads * size, module.get_parameter(gate).shape[1]
        shapes = {**shape.shapes, gate: (height, width), "forget_gate.dt_bias": (height,)}
        return LayerShape(shapes, _gate_attributes(module, size))


def _gate_projection(module: Any) -> str:
    """The projection of a forget gate with a row for each state."""
    return "f_b_proj" if hasattr(module.forget_gate, "f_b_proj") else "f_proj"


def _gate_changes(layer: SSMLayer, kept: Tensor) -> tuple[ParameterChange, ...]:
    """The rows of a forget gate for the states `(heads, r)` that stay."""
    places = (kept + torch.arange(kept.shape[0])[:, None] * layer.state_size).flatten()
    changes = []
    for name in (f"forget_gate.{_gate_projection(layer.module)}.weight", "forget_gate.dt_bias"):
        parameter = layer.module.get_parameter(name)
        moments = (MomentTerm(parameter, places, 0),)
        changes.append(ParameterChange.mapped(parameter_name(layer, name), parameter, places, 0, moments))
    return tuple(changes)


def _gate_attributes(module: Any, size: int) -> tuple[AttributeChange, ...]:
    """What a forget gate says of its sizes."""
    gate, height = module.forget_gate, module.num_heads * size
    projection = getattr(gate, _gate_projection(module))
    return (
        AttributeChange(gate, "head_dim", size),
        AttributeChange(gate, "qkv_dim", height),
        AttributeChange(projection, "out_features", height),
    )


_OTHERS = ("o_norm.weight", "forget_gate.A_log", "forget_gate.f_a_proj.weight")
_WIDE = ("v_proj", "b_proj", "g_proj", "g_a_proj", "g_b_proj", "o_proj")
_LAYOUT = Layout(
    "head_dim",
    (rows("q_proj", C), rows("k_proj", B), rows("conv1d", C, B, "qkv_dim")),
    output="o_proj",
    groups="num_heads",
    others=(*_OTHERS, *(f"{name}.weight" for name in _WIDE)),
)
_OWN = "hf_compressm.models.modeling_compressm_linear_attention.CompreSSM"
_FAMILIES = (
    ("kimi_linear", "KimiLinearDeltaAttention"),
    ("bailing_hybrid", "BailingHybridDeltaAttention"),
    ("glm5_next", "Glm5NextTextLinearAttention"),
)

for _family, _class in _FAMILIES:
    for _path, _field in (
        (f"transformers.models.{_family}.modeling_{_family}.{_class}", "linear_head_dim"),
        (f"{_OWN}{_class}", "linear_key_head_dim"),
    ):
        register(
            KimiFamily(
                name=_family,
                module_type=_path,
                size_field=_field,
                per_layer=False,
                criteria=("empirical", "fisher"),
                layout=_LAYOUT,
            )
        )
