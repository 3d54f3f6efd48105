"""The S5 layer of the package s5-pytorch (`s5.s5_model.S5SSM`), with complex parameters.

| symbol | meaning | parameter |
|---|---|---|
| Lambda | continuous-time eigenvalues, complex | `Lambda` `(N,)` |
| Delta | step sizes | `log_step` `(N,)` |
| B | input matrix | `B` `(N, H, 2)`, real and imaginary parts |
| C | output matrix, complex; of a bidirectional layer both read-outs side by side | `C` `(H, N)` or `(H, 2N)` |

Every state is stored, none implied by its conjugate: `y_k = Re(C h_k) + D u_k`. The discretisation is that of
`families/s5.py`, with a step scale of 1. The package's `S5` calls the layer inside `torch.vmap`, where no statistics
can be taken, so layers are measured by their closed-form Gramians, without data.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.changes import AttributeChange, MomentTerm
from hf_compressm.families.complex_terms import ComplexTerm
from hf_compressm.families.family import CutMethod, SSMLayer
from hf_compressm.families.linear import LinearFamily, Reduction
from hf_compressm.families.registry import register
from hf_compressm.families.s5 import input_factor, mean_log_step, step_product
from hf_compressm.numerics import DiagonalSystem
from hf_compressm.utils.devices import on_host


DISCRETIZATIONS = {"discretize_zoh": "zoh", "discretize_bilinear": "bilinear"}
"""By the name of the function that a layer keeps as `discretize`."""


class S5PytorchFamily(LinearFamily):
    """Family of `s5.s5_model.S5SSM`."""

    def system(self, module: Any) -> DiagonalSystem:
        """The discrete-time system of a layer, on the CPU; C stacks both read-outs of a bidirectional layer."""
        values = {name: _double(value) for name, value in on_host(dict(module.named_parameters())).items()}
        product = values["Lambda"] * values["log_step"].exp()
        bilinear = _discretization(module) == "bilinear"
        eigenvalues = (2 + product) / (2 - product) if bilinear else product.exp()
        B = torch.view_as_complex(values["B"]) * self._factor(module, values)[:, None]
        C = torch.cat(values["C"].chunk(2, dim=1)) if module.bidir else values["C"]
        return DiagonalSystem(eigenvalues, B, C)

    def directions(self, module: Any) -> tuple[bool, ...]:
        """Whether each pass over the sequence is reversed."""
        return (False, True) if module.bidir else (False,)

    def state_size(self, module: Any) -> int:
        """The number of eigenvalues: the layer stores its size nowhere else."""
        return int(module.Lambda.shape[0])

    def state_entries(self, module: Any) -> int:
        """Two real numbers for each state, in each direction."""
        return 2 * self.state_size(module) * len(self.directions(module))

    def attributes(self, module: Any, size: int) -> tuple[AttributeChange, ...]:
        """None: all sizes are those of the parameters."""
        return ()

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """No module inside the layer.

        Raises:
            ValueError: if the layer is none of a diagonal linear time-invariant system.
        """
        _check_linear(layer)
        return ()

    def parametrize(self, module: Any, reduction: Reduction, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters for a reduced system; step sizes as for `S5Layer`."""
        system = reduction.system
        log_step = mean_log_step(present["log_step"], reduction)
        Lambda = step_product(system.eigenvalues, _discretization(module)) / log_step.exp()
        values = {"Lambda": Lambda, "log_step": log_step}
        B = system.B / self._factor(module, values)[:, None]
        return values | {"B": torch.view_as_real(B)}

    def read_out(self, module: Any, C: Tensor) -> dict[str, Tensor]:
        """C itself."""
        return {"C": C}

    def matrix_terms(self, module: Any, B_map: Tensor, C_map: Tensor) -> dict[str, tuple[MomentTerm, ...]]:
        """One term for each of B and C."""
        return {"B": (ComplexTerm(module.B, B_map, 0),), "C": (ComplexTerm(module.C, C_map, 1),)}

    def input_gradient_scale(self, module: Any, values: Mapping[str, Tensor]) -> Tensor:
        """The discretisation's factor f."""
        return self._factor(module, {name: _double(values[name]) for name in ("Lambda", "log_step")})

    def _factor(self, module: Any, values: Mapping[str, Tensor]) -> Tensor:
        return input_factor(values["Lambda"], values["log_step"].exp(), _discretization(module))


def _double(parameter: Tensor) -> Tensor:
    """A parameter in double precision."""
    return parameter.to(torch.complex128 if parameter.is_complex() else torch.float64)


def _discretization(module: Any) -> str:
    return DISCRETIZATIONS[module.discretize.__name__]


def _check_linear(layer: SSMLayer) -> None:
    """Raise `ValueError` for a layer whose output is not that of the system that its parameters describe."""
    module = layer.module
    discretize = getattr(module.discretize, "__name__", str(module.discretize))
    if module.liquid:
        why = "liquid=True: the input changes its eigenvalues, so it is not linear time-invariant"
    elif module.degree != 1:
        why = f"degree={module.degree}: its input matrix is a power of the stored one, which a cut cannot write"
    elif module.bcInit == "factorized":
        why = "bcInit='factorized': its B and C are products of thin factors, which a cut would have to fill up"
    elif discretize not in DISCRETIZATIONS:
        why = f"the discretisation {discretize}; known are {', '.join(sorted(DISCRETIZATIONS))}"
    else:
        return
    raise ValueError(f"{layer.name or 'The layer'} has {why}. Leave it out with ignore_layers.")


register(
    S5PytorchFamily(
        name="s5_pytorch",
        module_type="s5.s5_model.S5SSM",
        size_field="state_width",
        per_layer=True,
        criteria=("hankel",),
        stabilizing="a lower learning rate, or a step after each update that clips the real part of Lambda",
        tells_texts_apart_by=frozenset(),
        axes={"Lambda": 0, "log_step": 0, "B": 0, "C": 1, "D": None},
    )
)
