"""S5 layers: continuous-time `Lambda` and B, discretised with a step size per state (arXiv 2208.04933, section 3.2).

| symbol | meaning | shape |
|---|---|---|
| lambda | discrete-time eigenvalue | `(slots,)` |
| Lambda, Delta | continuous-time eigenvalue and step size | `(slots,)` |
| f | `B of the discrete system = f * stored B` | `(slots,)` |

Zero-order hold: `lambda = exp(Lambda Delta)`, `f = (lambda - 1) / Lambda`. Bilinear: `lambda = (2 + Lambda Delta) /
(2 - Lambda Delta)`, `f = 2 Delta / (2 - Lambda Delta)`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.linear import LinearFamily, Reduction
from hf_compressm.families.registry import register
from hf_compressm.models.modeling_s5 import S5Layer


SMALLEST_MODULUS = 1e-30
"""Smallest |lambda|, so that log(lambda) stays finite if a reduced system has an eigenvalue at zero."""
LARGEST_REAL_PART = -1e-4
"""The largest Re(Lambda) under `clip_eigs`; new step sizes are small enough to keep new eigenvalues below it."""
SMALLEST_STEP_PRODUCT = 1e-8
"""Below this |Lambda Delta|, `f` is `Delta` in double precision, and the quotient would divide zero by zero."""


class S5Family(LinearFamily):
    """Family of `hf_compressm.models.S5Layer`."""

    def granularity(self, module: Any) -> int:
        """2 with conjugate symmetry, where states come in pairs, else 1."""
        return 2 if module.conj_sym else 1

    def parametrize(self, module: Any, reduction: Reduction, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters for a reduced system.

        The discrete eigenvalue fixes only `Lambda Delta`. The step size of a new state is the geometric mean of the
        old ones, weighted by their participation, and smaller if `clip_eigs` demands it.
        """
        system = reduction.system
        log_step = mean_log_step(present["log_step"], reduction)
        product = step_product(system.eigenvalues, module.discretization)
        if module.clip_eigs:
            log_step = torch.minimum(log_step, (product.real / (1.001 * LARGEST_REAL_PART)).clamp_min(1e-30).log())
        Lambda = product / log_step.exp()
        values = {"Lambda_re": Lambda.real, "Lambda_im": Lambda.imag, "log_step": log_step}
        B = system.B / self.input_gradient_scale(module, values)[:, None]
        return values | {"B_re": B.real, "B_im": B.imag}

    def input_gradient_scale(self, module: Any, values: Mapping[str, Tensor]) -> Tensor:
        """The discretisation's factor f."""
        real, imaginary, log_step = (values[name].double() for name in ("Lambda_re", "Lambda_im", "log_step"))
        real = real.clamp(max=LARGEST_REAL_PART) if module.clip_eigs else real
        return input_factor(torch.complex(real, imaginary), log_step.exp(), module.discretization)


def mean_log_step(log_step: Tensor, reduction: Reduction) -> Tensor:
    """The logarithm of each new state's step size: the mean of the old ones, weighted by their participation."""
    weight = reduction.participation.abs()
    return weight @ log_step.double() / weight.sum(dim=1)


def step_product(eigenvalues: Tensor, discretization: str) -> Tensor:
    """`Lambda Delta` of a discrete eigenvalue."""
    if discretization == "bilinear":
        return 2 * (eigenvalues - 1) / (eigenvalues + 1)
    return torch.complex(eigenvalues.abs().clamp_min(SMALLEST_MODULUS).log(), eigenvalues.angle())


def input_factor(Lambda: Tensor, step: Tensor, discretization: str) -> Tensor:
    """The discretisation's factor f, complex `(slots,)`."""
    product = Lambda * step
    if discretization == "bilinear":
        return 2 * step / (2 - product)
    small = product.abs() < SMALLEST_STEP_PRODUCT
    safe = torch.where(small, torch.ones_like(product), product)
    return torch.where(small, step.to(safe.dtype), step * torch.expm1(safe) / safe)


register(
    S5Family(
        name="s5",
        module_type=S5Layer,
        size_field="state_size",
        per_layer=True,
        criteria=("empirical", "hankel"),
        axes={"Lambda_re": 0, "Lambda_im": 0, "log_step": 0, "B_re": 0, "B_im": 0, "C_re": 1, "C_im": 1, "D": None},
    )
)
