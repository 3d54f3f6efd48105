"""Layers of the mamba-ssm package in a model of one's own; stand-ins with its paths and names, since it needs CUDA."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import find_layers
from tests.blocks import Mamba, Mamba2, Vim, at_path


WITH_MLP = {"headdim": 4, "d_ssm": 16, "D_has_hdim": True, "rmsnorm": False, "bias": True}
"""A gated MLP beside the scan, and a D per channel."""
Fork = at_path(Vim, "mamba_ssm.modules.mamba_simple.Mamba")
"""Vision Mamba's fork, which reads the sequence in both directions, has the path of the package."""


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
    "mamba": lambda: Mamba(12, 16, dt_rank=2),
    "mamba2": lambda: Mamba2(12, 16, ngroups=2, **WITH_MLP),
    "mamba2-no-bias": lambda: Mamba2(12, 16, **{**WITH_MLP, "bias": False}, conv_bias=False),
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
def test_a_fork_at_the_same_path_with_a_second_direction_is_cut_as_what_it_is(d_state: int) -> None:
    """The state is also as wide as the model, or as its inner channels; directions keep states of their own."""
    model = OwnModel([Fork(12, d_state), Mamba(12, d_state)])
    tokens = torch.randint(20, (3, 11))
    fork = model.layers[0]
    with torch.no_grad():
        for projection, dead in ((fork.x_proj, slice(1, 7)), (fork.x_proj_b, slice(7, 13))):  # rows of B, after one
            projection.weight[dead] = 0
    before = model(tokens).detach()
    result = compress(model, CompreSSMConfig(target_state_size=d_state - 6), [{"input_ids": tokens}])
    assert {layer.family for layer in result.plan.layers} == {"vim", "mamba"}
    assert result.plan.layers[0].predicted_error < 1e-5
    assert fork.A_log.shape == fork.A_b_log.shape == (24, d_state - 6)
    assert torch.allclose(fork.A_b_log[0], torch.tensor([*range(1, 7), *range(13, d_state + 1)]).log())
    assert torch.allclose(fork.A_log[0], torch.arange(7.0, d_state + 1).log())
    assert float((model(tokens).detach() - before).norm() / before.norm()) < 0.1


def test_its_first_version_is_refused_by_name() -> None:
    """Two directions that share B and C, with one projection."""
    layer = Mamba(12, 16)
    layer.A_b_log = nn.Parameter(torch.zeros_like(layer.A_log))
    with pytest.raises(ValueError, match=r"layers\.0 has A_b_log of shape \(24, 16\).*mamba layers do not have"):
        compress(OwnModel([layer]), CompreSSMConfig(target_state_size=6), [{"input_ids": torch.randint(20, (3, 11))}])
