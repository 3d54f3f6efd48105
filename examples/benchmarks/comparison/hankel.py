"""Hankel nuclear norm regularisation: the sum of every layer's Hankel singular values (HSVs) is added to the loss.

| symbol | meaning | shape |
|---|---|---|
| P, Q | controllability and observability Gramian | `(n, n)` |
| sigma | HSVs, `sqrt(eig(P Q))` | `(n,)` |
| T, W | balancing transformation and its inverse, `W P W^H = T^H Q T = diag(sigma)` | `(n, m)`, `(m, n)` |

Discrete time. The sum of the HSVs is the nuclear norm of the Hankel operator. A singular value that is repeated has no
gradient of its own, but the sum has: in balanced coordinates `d sum(sigma) = tr(W dP W^H + T^H dQ T) / 2`, with T and
W held fixed. Antoulas (2005), section 7.2: `sum(sigma)` is the least `tr(W P W^H + T^H Q T) / 2` over all coordinates.
"""

from typing import Any

import torch
from clock import TimedTrainer
from torch import Tensor, nn

from hf_compressm.families import find_layers
from hf_compressm.numerics import DiagonalSystem, balance, gramians


NEGLIGIBLE = 1e-9
"""HSVs below this share of the largest are mostly round-off, and so would their gradients be, which grow with 1/sigma:
they count as zero, which is a subgradient of the nuclear norm there."""


def hankel_nuclear_norm(eigenvalues: Tensor, B: Tensor, C: Tensor, realization: str = "real") -> Tensor:
    """Sum of the HSVs of `h_k = diag(eigenvalues) h_{k-1} + B u_k`, `y_k = Re(C h_k)`, differentiable in all three.

    Args:
        eigenvalues: complex `(N,)`, inside the unit circle.
        B: complex `(N, H)`.
        C: complex `(P, N)`.
        realization: `"real"` for the real map, of order 2N, or `"complex"`.

    Returns:
        float64 scalar; zero, with zero gradient, for a system without output. Costs O(n^3).

    Raises:
        ValueError: if the system is not finite and stable.
    """
    system = DiagonalSystem(eigenvalues, B, C)
    with torch.no_grad():
        balancing = balance(system, realization)
        sigma = balancing.hankel_singular_values
        kept = sigma > NEGLIGIBLE * sigma[0]
        weight = sigma[kept].rsqrt()
        T, W = balancing.right[:, kept] * weight, weight[:, None] * balancing.left[kept]
    P, Q = gramians(system, realization)
    return (((W @ P) * W.conj()).sum() + ((Q @ T) * T.conj()).sum()).real / 2


def norm_of_layers(model: nn.Module, realization: str = "real") -> Tensor:
    """Sum of `hankel_nuclear_norm` over a model's S5 and LRU layers.

    Raises:
        ValueError: for a layer of another family, which has no HSVs in closed form.
    """
    layers = find_layers(model)
    others = [layer.name for layer in layers if not hasattr(layer.module, "system")]
    if others:
        raise ValueError(f"The Hankel nuclear norm is defined for S5 and LRU layers; {others[0]} is none.")
    norms = [hankel_nuclear_norm(*layer.module.system(torch.float64), realization) for layer in layers]
    return torch.stack(norms).sum()


class HankelRegularisedTrainer(TimedTrainer):
    """A Trainer that adds `weight` times the sum of all HSVs to the loss of every step.

    Args:
        weight: of the sum, 0 or more.
        realization: `"real"` or `"complex"`, whose HSVs are summed.
        **arguments: those of `TimedTrainer`.

    Raises:
        ValueError: for a negative weight.
    """

    def __init__(self, *, weight: float, realization: str = "real", **arguments: Any) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must be 0 or more, got {weight}.")
        super().__init__(**arguments)
        self.weight, self.realization = weight, realization

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; in training, the weighted norm is added."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + self.weight * norm_of_layers(model, self.realization).to(loss)
        return (loss, outputs) if return_outputs else loss
