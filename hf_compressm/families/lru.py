"""LRU layers: `lambda = exp(-exp(nu_log) + i theta)`, B scaled by `exp(gamma_log)` (arXiv 2303.06349, section 3)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.linear import LinearFamily, Reduction
from hf_compressm.families.registry import register
from hf_compressm.models.modeling_lru import LRULayer


SMALLEST_MODULUS = 1e-30
"""Smallest |lambda|, so that log(-log|lambda|) stays finite if a reduced system has an eigenvalue at zero."""


class LRUFamily(LinearFamily):
    """Family of `hf_compressm.models.LRULayer`."""

    def parametrize(self, module: Any, reduction: Reduction, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters for a reduced system; gamma is set to `sqrt(1 - |lambda|^2)` as at initialisation."""
        system = reduction.system
        modulus = system.eigenvalues.abs().clamp_min(SMALLEST_MODULUS)
        gamma = ((1 - modulus) * (1 + modulus)).sqrt()
        B = system.B / gamma[:, None]
        return {
            "nu_log": torch.log(-torch.log(modulus)),
            "theta": system.eigenvalues.angle(),
            "gamma_log": gamma.log(),
            "B_re": B.real,
            "B_im": B.imag,
        }

    def input_gradient_scale(self, module: Any, values: Mapping[str, Tensor]) -> Tensor:
        """The factor `exp(gamma_log)`."""
        return values["gamma_log"].double().exp().to(torch.complex128)


register(
    LRUFamily(
        name="lru",
        module_type=LRULayer,
        size_field="state_size",
        per_layer=True,
        criteria=("empirical", "hankel"),
        axes={"nu_log": 0, "theta": 0, "gamma_log": 0, "B_re": 0, "B_im": 0, "C_re": 1, "C_im": 1, "D": None},
    )
)
