"""Layers of the mamba-ssm package in a model of one's own; stand-ins with its paths and names, since it needs CUDA."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import find_layers
from hf_compressm.scans import selective_scan, ssd_scan


class Mamba(nn.Module):
    """Names and layout of `mamba_ssm.Mamba`."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.d_state, self.dt_rank, inner = d_state, 2, 2 * d_model
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner, 2 + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(2, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        x, z = self.in_proj(hidden_states).mT.chunk(2, dim=1)
        x = self.act(self.conv1d(x)[..., : z.shape[-1]])
        dt, B, C = self.x_proj(x.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(x, self.dt_proj(dt).mT, -self.A_log.exp(), B.mT, C.mT, self.D, z=z, delta_softplus=True)
        return self.out_proj(y.mT)


class Mamba2(nn.Module):
    """Names and layout of `mamba_ssm.Mamba2`, with a gated MLP beside the scan and a D per channel."""

    def __init__(self, d_model: int, d_state: int, ngroups: int, bias: bool) -> None:
        super().__init__()
        self.d_state, self.ngroups, self.headdim, self.nheads = d_state, ngroups, 4, 4
        self.d_ssm, self.d_mlp = 16, 2 * d_model - 16
        self.dt_limit = (0.0, float("inf"))
        convolved = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_mlp + self.d_ssm + convolved + self.nheads, bias=bias)
        self.conv1d = nn.Conv1d(convolved, convolved, 4, groups=convolved, padding=3, bias=bias)
        self.act = nn.SiLU()
        self.dt_bias = nn.Parameter(torch.zeros(self.nheads))
        self.A_log = nn.Parameter(torch.rand(self.nheads))
        self.D = nn.Parameter(torch.ones(self.d_ssm))
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=bias)

    def forward(self, u: Tensor, **kwargs: Any) -> Tensor:
        channels = self.ngroups * self.d_state
        widths = [self.d_mlp, self.d_mlp, self.d_ssm, self.d_ssm + 2 * channels, self.nheads]
        z0, x0, z, x_B_C, dt = self.in_proj(u).split(widths, dim=-1)
        x_B_C = self.act(self.conv1d(x_B_C.mT)[..., : u.shape[1]]).mT
        x, B, C = x_B_C.split([self.d_ssm, channels, channels], dim=-1)
        heads = (self.nheads, self.headdim)
        y = ssd_scan(
            x.unflatten(-1, heads),
            dt,
            -self.A_log.exp(),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            D=self.D.view(heads),
            z=z.unflatten(-1, heads),
            dt_bias=self.dt_bias,
            dt_softplus=True,
        ).flatten(2)
        return self.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))


Mamba.__module__, Mamba2.__module__ = "mamba_ssm.modules.mamba_simple", "mamba_ssm.modules.mamba2"


class Vim(Mamba):
    """Names and layout of Vision Mamba's fork, which reads the sequence in both directions, at the same path."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__(d_model, d_state)
        inner = 2 * d_model
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())
        self.conv1d_b = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj_b = nn.Linear(inner, 2 + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(2, inner)
        self.D_b = nn.Parameter(torch.ones(inner))


Vim.__module__, Vim.__name__, Vim.__qualname__ = Mamba.__module__, "Mamba", "Mamba"


class OwnModel(nn.Module):
    """Anybody's model: embeddings, SSM layers, and a config of its own or none."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embeddings, self.layers = nn.Embedding(20, 12), nn.ModuleList(layers)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


LAYERS = {
    "mamba": lambda: Mamba(12, 16),
    "mamba2": lambda: Mamba2(12, 16, 2, True),
    "mamba2-no-bias": lambda: Mamba2(12, 16, 1, False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("config", [None, "mamba-ssm"])
def test_layers_of_mamba_ssm_are_cut_in_a_model_of_ones_own(name: str, config: str | None) -> None:
    torch.manual_seed(0)
    model = OwnModel([LAYERS[name](), LAYERS[name]()])
    if config:
        model.config = SimpleNamespace(d_model=12, ssm_cfg={"layer": name})
    assert {layer.family.name for layer in find_layers(model)} == {name.partition("-")[0]}
    tokens = torch.randint(20, (3, 11))
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model(tokens).detach()
    result = compress(model, CompreSSMConfig(target_state_size=6), [{"input_ids": tokens}], optimizer)
    assert set(result.state_sizes_after.values()) == {6}
    assert [layer.d_state for layer in model.layers] == [6, 6]
    assert float((model(tokens).detach() - before).norm() / before.norm()) < 0.2
    if config:
        assert model.config.ssm_cfg == {"layer": name, "d_state": 6}
    model(tokens).square().sum().backward()
    old = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert all((new != before_step).any() for new, before_step in zip(model.parameters(), old, strict=True))


@pytest.mark.parametrize("d_state", [16, 12, 24])
def test_a_fork_at_the_same_path_with_a_second_direction_is_refused_by_name(d_state: int) -> None:
    """The state is also as wide as the model, or as its inner channels."""
    model = OwnModel([Vim(12, d_state), Vim(12, d_state)])
    with pytest.raises(ValueError, match=r"layers\.0 has A_b_log of shape \(24, .*mamba layers do not have"):
        compress(model, CompreSSMConfig(target_state_size=6), [{"input_ids": torch.randint(20, (3, 11))}])
    assert model.layers[0].A_log.shape == (24, d_state)
