"""A family as CONTRIBUTING.md asks for one: leaky integrators, real states that are selected by what each passes on.

| symbol | meaning | shape |
|---|---|---|
| a | decay of each state, `sigmoid(decay)` | `(N,)` |
| B, C | input and read-out | `(N, H)`, `(H, N)` |

Discrete time, `h_k = a h_{k-1} + B u_k`, `y_k = C h_k`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_compressm.families import (
    AttributeChange,
    CutMethod,
    Family,
    LayerCut,
    Measurement,
    MomentTerm,
    ParameterChange,
    SSMLayer,
    Statistics,
    register,
)
from hf_compressm.families.family import has_finite_parameters, kept_order
from hf_compressm.numerics import DiagonalSystem, gramians, hankel_singular_values, relative_h2_error


class ToyConfig(PreTrainedConfig):
    model_type = "compressm_toy"
    vocab_size: int = 13
    hidden_size: int = 6
    state_size: int = 8
    num_hidden_layers: int = 2
    use_cache: bool = False


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.state_size = config.state_size
        self.decay = nn.Parameter(torch.linspace(-1.0, 2.0, config.state_size))
        self.B_re = nn.Parameter(torch.randn(config.state_size, config.hidden_size))
        self.C_re = nn.Parameter(torch.randn(config.hidden_size, config.state_size))

    @property
    def slots(self) -> int:
        return self.decay.numel()

    def forward(self, u: Tensor) -> Tensor:
        state, outputs = u.new_zeros(u.shape[0], self.slots), []
        for step in (u @ self.B_re.mT).unbind(1):
            state = torch.sigmoid(self.decay) * state + step
            outputs.append(state @ self.C_re.mT)
        return torch.stack(outputs, dim=1)


class ToyForCausalLM(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what the modules have made themselves."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


class ToyFamily(Family):
    """The family; the textbook's diagonal system, without a source of its own."""

    def state_size(self, module: Any) -> int:
        return int(module.state_size)

    def state_entries(self, module: Any) -> int:
        return int(module.state_size)

    def state_axes(self, module: Any) -> dict[str, int | None]:
        return {"decay": 0, "B_re": 0, "C_re": 1}

    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        return None

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        size = layer.state_size
        if not has_finite_parameters(layer.module):
            nothing = torch.full((size,), torch.nan, dtype=torch.float64)
            return Measurement(nothing, torch.zeros(size + 1), "non-finite parameters")
        system = system_of(layer.module)
        P, Q = (gramian.real for gramian in gramians(system))
        scores = (P.diagonal() * Q.diagonal()).sqrt()
        order = scores.argsort(descending=True)[kept_order(size, method, layer)]
        errors = [1.0, *(relative_h2_error(system, selected(system, order[:count])) for count in range(1, size)), 0.0]
        sigma = hankel_singular_values(system, realization="complex")
        return Measurement(sigma, torch.tensor(errors, dtype=torch.float64), detail=order, scores=scores[None])

    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        module, kept = layer.module, measurement.detail[:size].sort().values
        sigma = measurement.hankel_singular_values
        places = {"decay": (module.decay, 0), "B_re": (module.B_re, 0), "C_re": (module.C_re, 1)}
        return LayerCut(
            changes=tuple(
                ParameterChange(
                    f"{layer.name}.{name}",
                    parameter,
                    parameter.detach().index_select(axis, kept),
                    (MomentTerm(parameter, kept, axis),),
                )
                for name, (parameter, axis) in places.items()
            ),
            attributes=(AttributeChange(module, "state_size", size),),
            predicted_error=float(measurement.errors[size]),
            error_bound=None,
            energy_kept=float(sigma[:size].sum() / sigma.sum()),
        )


def system_of(module: Any) -> DiagonalSystem:
    a, B, C = (value.detach().double() for value in (torch.sigmoid(module.decay), module.B_re, module.C_re))
    return DiagonalSystem(*(value.to(torch.complex128) for value in (a, B, C)))


def selected(system: DiagonalSystem, kept: Tensor) -> DiagonalSystem:
    return DiagonalSystem(system.eigenvalues[kept], system.B[kept], system.C[:, kept])


register(ToyFamily("toy", ToyLayer, "state_size", per_layer=False, criteria=("selection",)))
AutoConfig.register(ToyConfig.model_type, ToyConfig, exist_ok=True)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
