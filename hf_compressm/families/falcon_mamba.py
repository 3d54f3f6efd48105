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

from hf_compressm.families.family import CutMethod, MomentTerm, ParameterChange, SSMLayer
from hf_compressm.families.mamba import STATE_AXES, MambaFamily, projection_maps, step_rank
from hf_compressm.families.registry import register
from hf_compressm.families.selective import Selection, float64, parameter_name


@dataclass(frozen=True, eq=False)
class NormFit:
    """Least-squares fit of a cut layer's B or C to the wanted one."""

    scale: Tensor  # (r,), the new norm weights; equal entries where the layer has none
    residual: Tensor  # (r,), share of each entry's mean square that is not fitted


@dataclass(frozen=True)
class NormalizedMambaFamily(MambaFamily):
    """Family of `FalconMambaMixer` and `JambaMambaMixer`."""

    sampled_tokens: int = 1024

    def normalized(self, module: Any, time_step: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step, B and C, each normalised by its root mean square."""
        return module.dt_layernorm(time_step), module.b_layernorm(B), module.c_layernorm(C)

    def changes(self, layer: SSMLayer, kept: Tensor, R: Tensor, selection: Selection) -> tuple[ParameterChange, ...]:
        """The changes of Mamba, and those that correct the factor of the normalisation."""
        module, indices = layer.module, kept[0]
        weight = _norm_weight(module.c_layernorm)
        forward, adjoint = projection_maps(
            step_rank(module, R.shape[1]), indices, weight[:, None] * R[0] / weight[indices]
        )
        decay, _ = super().changes(layer, kept, R, selection)
        projection = module.x_proj.weight
        moments = (MomentTerm(projection, adjoint, dim=0),)
        x_proj = ParameterChange(
            parameter_name(layer, "x_proj.weight"), projection, forward @ float64(projection), moments, forward
        )
        fits = self._fits(module, kept, R, selection)
        return decay, x_proj, *self._scale_changes(layer, indices, *fits)

    def _scale_changes(self, layer: SSMLayer, indices: Tensor, B: NormFit, C: NormFit) -> list[ParameterChange]:
        """Changes that put the factors into the norms' weights, or into D and the output projection."""
        module = layer.module
        if _learns(module.b_layernorm):
            norms = {"b_layernorm.weight": (module.b_layernorm, B), "c_layernorm.weight": (module.c_layernorm, C)}
            return [
                ParameterChange(
                    parameter_name(layer, name), norm.weight, fit.scale, (MomentTerm(norm.weight, indices, 0),)
                )
                for name, (norm, fit) in norms.items()
            ]
        factor = B.scale[0] * C.scale[0]
        scaled = {"out_proj.weight": (module.out_proj.weight, factor), "D": (module.D, 1 / factor)}
        return [
            ParameterChange(
                parameter_name(layer, name),
                parameter,
                float64(parameter) * by,
                (MomentTerm(parameter, 1 / by, dim=0),),
                row_map=by,
            )
            for name, (parameter, by) in scaled.items()
        ]

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """`x_proj`, and what takes the factors."""
        learns = _learns(layer.module.b_layernorm)
        return ("x_proj", "b_layernorm", "c_layernorm") if learns else ("x_proj", "out_proj", "D")

    def attributes(self, module: Any, size: int, kept: Tensor) -> list[tuple[nn.Module, str, Any]]:
        """The width of `x_proj`, and FalconMamba's placeholders for the norms' weights."""
        norms = [norm for norm in (module.b_layernorm, module.c_layernorm) if not _learns(norm)]
        placeholders = [(norm, "weight", norm.weight[kept[0]]) for norm in norms if hasattr(norm, "weight")]
        return [*super().attributes(module, size, kept), *placeholders]

    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Those of Mamba, and of the norms' weights."""
        learnt = [name for name in ("b_layernorm", "c_layernorm") if _learns(getattr(module, name))]
        return {**super().shapes(module, size), **{f"{name}.weight": (size,) for name in learnt}}

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
            criteria=("interpolative",),
            state_axes={
                **STATE_AXES,
                "dt_layernorm.weight": None,
                "b_layernorm.weight": 0,
                "c_layernorm.weight": 0,
            },
        )
    )
