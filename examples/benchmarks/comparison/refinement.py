"""A short H2-optimal refinement after a cut: the small system moves towards the output of the one that was cut.

| symbol | meaning |
|---|---|
| G, G_r | real map of a layer before the cut and after it |
| <G, F> | H2 product, `sum_k <G_k, F_k>` over the Markov parameters of two real maps |

Discrete time. `||G - G_r||^2 = <G, G> - 2 <G, G_r> + <G_r, G_r>` in closed form, minimised over the layer's own
parameters by L-BFGS, from the cut on. Source: arXiv 2507.10078.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback
from hf_compressm.families import SSMLayer, find_layers


System = tuple[Tensor, Tensor, Tensor]
"""Eigenvalues `(N,)`, B `(N, H)` and C `(P, N)`, complex128."""


def h2_product(first: System, second: System) -> Tensor:
    """`<G, F>` of two systems with `y = Re(C h)`, differentiable; float64.

    With S and R the solutions of `S = diag(a) S diag(b)^H + B D^H` and `R = diag(a) R diag(b) + B D^T`, it is
    `Re(tr(C S E^H) + tr(C R E^T)) / 2`.
    """
    (a, B, C), (b, D, E) = first, second
    S = (B @ D.mH) / (1 - a[:, None] * b.conj())
    R = (B @ D.mT) / (1 - a[:, None] * b)
    return (((C @ S) * E.conj()).sum() + ((C @ R) * E).sum()).real / 2


def refine(module: nn.Module, wanted: System, iterations: int) -> tuple[float, float]:
    """Bring a layer nearer to a system, in place; where that fails the layer stays as it is.

    Args:
        module: an S5 or LRU layer.
        wanted: what it should compute.
        iterations: of L-BFGS.

    Returns:
        The relative H2 error before and after.
    """
    work = copy.deepcopy(module).double().requires_grad_(True)
    energy = h2_product(wanted, wanted)

    def error() -> Tensor:
        system = work.system(torch.float64)
        return (energy - 2 * h2_product(wanted, system) + h2_product(system, system)) / energy

    parameters = [value for name, value in work.named_parameters() if name != "D"]
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error()
        loss.backward()
        return loss

    with torch.enable_grad():
        before = float(error().detach().clamp_min(0).sqrt())
        optimizer.step(closure)
    with torch.no_grad():
        after = float(error().clamp_min(0).sqrt())
        stable = bool((work.system(torch.float64)[0].abs() < 1).all())
        if not (after < before and stable):
            return before, before
        for own, found in zip(module.parameters(), work.parameters(), strict=True):
            own.copy_(found)
    return before, after


class Refinement(TrainerCallback):
    """Refines the layers after every cut of a `CompreSSMCallback`; `faces` go before it and behind it.

    Optimizer moments stay as the cut has left them.

    Args:
        compressm: the callback that cuts.
        iterations: of L-BFGS for each layer.
    """

    def __init__(self, compressm: CompreSSMCallback, iterations: int) -> None:
        self.compressm, self.iterations = compressm, iterations
        self.before: dict[str, System] = {}
        self.errors: list[dict[str, Any]] = []

    @property
    def remembering(self) -> TrainerCallback:
        """The face that goes before the callback that cuts: it keeps the systems that are about to be cut."""
        return _Remembering(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refine what was cut just now."""
        for layer in find_layers(kwargs["model"]) if self.before else ():
            wanted = self.before[layer.name]
            if layer.module.slots < wanted[0].numel():
                before, after = refine(layer.module, wanted, self.iterations)
                self.errors.append({"step": state.global_step, "layer": layer.name, "before": before, "after": after})
        self.before = {}


class _Remembering(TrainerCallback):
    """Keeps the systems of all layers where a cut is due."""

    def __init__(self, refinement: Refinement) -> None:
        self.refinement = refinement

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look before the cut."""
        if self.refinement.compressm.cut_follows(state.global_step):
            self.refinement.before = {layer.name: _system(layer) for layer in find_layers(kwargs["model"])}


def _system(layer: SSMLayer) -> System:
    """A layer's system as it is now."""
    with torch.no_grad():
        eigenvalues, B, C = layer.module.system(torch.float64)
    return eigenvalues.clone(), B.clone(), C.clone()
