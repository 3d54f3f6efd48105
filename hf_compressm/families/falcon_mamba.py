"""Mamba-1 layers that normalise step, B and C between projection and scan: FalconMamba and Jamba.

`B_t = w_B * b_t / rms(b_t)`, likewise C; Jamba learns w, FalconMamba has none. The r entries of a cut layer have
another root mean square, so B and C are off by factors `rho_t` that change from token to token. Their directions are
right: the read-out `R^T C` folds into the projection as in Mamba. The least-squares estimate s of the factors folds
into w if the layer has one. If not, it folds exactly into the parameters after the scan:
`W_out (s y + D u) = (s W_out) (y + D / s u)`. Only the variance of `rho_t` remains; the predicted error includes it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.changes import MomentTerm, ParameterChange, with_values
from hf_compressm.families.family import CutMethod, SSMLayer
from hf_compressm.families.layout import Layout, states
from hf_compressm.families.mamba import MAMBA, OTHERS
from hf_compressm.families.maps import float64
from hf_compressm.families.registry import register
from hf_compressm.families.selective import Selection, SelectiveFamily, parameter_name


@dataclass(frozen=True, eq=False)
class NormFit:
    """Least-squares fit of a cut layer's B or C to the wanted one."""

    scale: Tensor  # (r,), the new norm weights; equal entries where the layer has none
    residual: Tensor  # (r,), share of each entry's mean square that is not fitted


@dataclass(frozen=True)
class NormalizedMambaFamily(SelectiveFamily):
    """Family of `FalconMambaMixer` and `JambaMambaMixer`."""

    sampled_tokens: int = 1024

    @property
    def normalizes(self) -> bool:
        """B and C."""
        return True

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """The changes of Mamba, and those that correct the factor of the normalisation."""
        module, indices = layer.module, kept[0]
        weight = _norm_weight(module.c_layernorm)
        before_norm = weight[:, None] * R / weight[indices]
        changes = super().changes(layer, kept, before_norm, selection)
        B, C = self._fits(module, kept, R, selection)
        if _learns(module.b_layernorm):
            scales = {id(module.b_layernorm.weight): B.scale, id(module.c_layernorm.weight): C.scale}
            return with_values(changes, scales)
        factor = B.scale[0] * C.scale[0]
        return (
            *changes,
            _scaled(layer, "out_proj.weight", module.out_proj.weight, factor),
            _scaled(layer, "D", module.D, 1 / factor),
        )

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """`x_proj`, and what takes the factors."""
        learns = _learns(layer.module.b_layernorm)
        return ("x_proj", "b_layernorm", "c_layernorm") if learns else ("x_proj", "out_proj", "D")

    def mismatch(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> float:
        """The residuals of B and C, weighted by each state's share in the output."""
        B, C = self._fits(layer.module, kept, R, selection)
        read = (R[0].mT @ selection.Q[0] @ R[0]).diagonal()
        energy = selection.P[0].diagonal()[kept[0]] * read
        return float(
            ((B.residual + C.residual) * energy).sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
        )

    def _fits(self, module: Any, kept: Tensor, R: Tensor, selection: Selection) -> tuple[NormFit, NormFit]:
        """Factors of B and of C on the sampled tokens."""
        fits = []
        for norm, name, read in ((module.b_layernorm, "B", None), (module.c_layernorm, "C", R[0])):
            full = selection.samples[name][:, 0]  # (tokens, N)
            wanted = full[:, kept[0]] if read is None else full @ read
            fits.append(_fit(wanted, wanted / _norm_weight(norm)[kept[0]], _learns(norm)))
        return fits[0], fits[1]


def _scaled(layer: SSMLayer, name: str, parameter: nn.Parameter, factor: Tensor) -> ParameterChange:
    """A parameter multiplied by a factor."""
    moments = (MomentTerm(parameter, 1 / factor, dim=0),)
    return ParameterChange.mapped(parameter_name(layer, name), parameter, factor, 0, moments)


def _fit(wanted: Tensor, direction: Tensor, by_entry: bool) -> NormFit:
    """Least-squares factor of the normalised direction, `(tokens, r)`, one per entry or one for all."""
    tiny = torch.finfo(direction.dtype).tiny
    got = direction / direction.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(tiny)
    dims = (0,) if by_entry else (0, 1)
    scale = (got * wanted).sum(dims) / got.square().sum(dims).clamp_min(tiny)
    scale = scale.expand(wanted.shape[1])
    residual = (got * scale - wanted).square().sum(0) / wanted.square().sum(0).clamp_min(tiny)
    return NormFit(scale.clone(), residual)


def _learns(norm: nn.Module) -> bool:
    """Whether a norm has weights of its own; FalconMamba's are placeholders for a kernel."""
    return isinstance(getattr(norm, "weight", None), nn.Parameter)


def _norm_weight(norm: Any) -> Tensor:
    """The weight of a norm, float64 `(N,)`; an entry of 0 counts as 1, since its input cannot be recovered."""
    weight = float64(norm.weight) if _learns(norm) else torch.ones(norm.weight.numel(), dtype=torch.float64)
    return torch.where(weight == 0, torch.ones_like(weight), weight)


for _family, _type, _field in (
    ("falcon_mamba", "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer", "state_size"),
    ("jamba", "transformers.models.jamba.modeling_jamba.JambaMambaMixer", "mamba_d_state"),
):
    register(
        NormalizedMambaFamily(
            name=_family,
            module_type=_type,
            size_field=_field,
            per_layer=False,
            criteria=("interpolative", "fisher"),
            layout=Layout(
                "ssm_state_size",
                (*MAMBA, states("b_layernorm"), states("c_layernorm")),
                others=(*OTHERS, "dt_layernorm.weight"),
            ),
        )
    )
