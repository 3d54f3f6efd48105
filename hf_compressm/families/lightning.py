"""Lightning attention: the state of a head is a matrix that decays by one constant.

    S_t = lambda S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t

This is the recurrence of `mamba2.py` with k for B, q for C, v for x, steps of 1 and a group for each head, so the best
cut is balanced projection too. A stock layer has no state size of its own, since `head_dim` is also the width of its
values and of full attention: only a layer of this package's classes is cut. It also shows its recurrence as a call of
a function, where a stock layer writes it out: while a stock layer is measured, it runs the forward of this package.

Source: Lightning Attention-2, arXiv 2401.04658, equation 3.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.changes import AttributeChange
from hf_compressm.families.family import CutMethod, LayerCut, Measurement, SSMLayer
from hf_compressm.families.layout import B, C, Layout, Part
from hf_compressm.families.mamba2 import Mamba2Family
from hf_compressm.families.registry import register
from hf_compressm.families.selective import unmeasurable
from hf_compressm.families.sums import Statistics
from hf_compressm.models.modeling_compressm_linear_attention import own_class


@dataclass(frozen=True)
class LightningFamily(Mamba2Family):
    """Family of the lightning attention of transformers, and of this package's classes."""

    @property
    def cache_axis(self) -> int:
        """A cached state is `(batch, heads, N, M)`."""
        return -2

    @property
    def reruns(self) -> bool:
        """A norm over all heads follows the recurrence."""
        return True

    @property
    def unfused(self) -> Mapping[str, Any]:
        """The class in which it calls its recurrence."""
        return {"__class__": own_class("CompreSSMMiniMaxLightningAttention")}

    def fitted(self, module: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The projections."""
        for tensor in (module.B_proj, module.C_proj):
            yield tensor, torch.ones_like(tensor)

    def state_size(self, module: Any) -> int:
        """Rows of the projections, or the width of a head without them."""
        projection = getattr(module, "B_proj", None)
        return int(module.head_dim) if projection is None else int(projection.shape[1])

    def state_entries(self, module: Any) -> int:
        """One matrix for each head."""
        return self.state_size(module) * int(module.num_attention_heads * module.head_dim)

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """Empirical HSVs, and the order in which balanced states are kept; a stock layer that stays one keeps all."""
        if not self.projects(layer, method):
            return unmeasurable(
                layer,
                "head_dim is the width of its keys, values and full attention at once, so a stock layer cannot have "
                'fewer states; use compat="best"',
            )
        return super().measure(layer, method, statistics)

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """Project onto `size` states of every head."""
        fields = {"linear_key_head_dim": size}
        if layer.owner is not None:  # the width stays, also where the configuration leaves it to the hidden size
            fields["head_dim"] = getattr(layer.owner.configs[0], "head_dim")  # noqa: B009 - no attribute for mypy
        return replace(super().cut(layer, method, measurement, size), attributes=(), config_fields=fields)

    def attributes(self, module: Any, size: int, kept: Tensor) -> tuple[AttributeChange, ...]:
        """None: they are those of the channels before the projections."""
        return ()


_LAYOUT = Layout(
    "head_dim",
    (Part("qkv_proj", 0, (C, B, "head_dim"), interleaved=True),),
    groups="num_attention_heads",
    others=(
        *("norm.weight", "output_gate.weight", "out_proj.weight"),
        *("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
    ),
)
_CLASSES = (
    ("transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention", "head_dim"),
    (
        "hf_compressm.models.modeling_compressm_linear_attention.CompreSSMMiniMaxLightningAttention",
        "linear_key_head_dim",
    ),
)

for _path, _field in _CLASSES:
    register(
        LightningFamily(
            name="minimax",
            module_type=_path,
            size_field=_field,
            per_layer=False,
            criteria=("empirical", "fisher"),
            layout=_LAYOUT,
            beside="qkv_proj",
        )
    )
