"""Mamba-3: what is measured is what the recurrence computes, pairs stay together, and norms are made up for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import CutMethod, SSMLayer, collect_statistics, find_layers, mamba3
from hf_compressm.families.laws import LayoutError, check_laws
from tests.blocks import Mamba3
from tests.blocks.mamba3 import mamba3_siso_combined
from tests.families import ready
from tests.families.measuring import signals_of


WIDTH = 12
EXACT = 1e-5
"""Relative; float32 sums in another order."""
NEAR = 0.15
"""How far the error may lie from the predicted one, which leaves out what D passes on."""


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with ready.as_installed():
        yield


def stack(size: int = 16, noise: float = 0.3, **settings: Any) -> ready.Stack:
    model = ready.Stack([Mamba3(WIDTH, size, headdim=6, **settings)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def cut(model: ready.Stack, size: int, data: Tensor, **settings: Any) -> tuple[float, float]:
    """The error of a cut layer's output, and the predicted one."""
    before = model.layers[0](data).detach()
    result = compress(model, CompreSSMConfig(target_state_size=size, **settings), [{"hidden": data}])
    (layer,) = result.plan.layers
    assert layer.status == "cut", layer.reason
    return float((model.layers[0](data).detach() - before).norm() / before.norm()), layer.predicted_error


@pytest.mark.parametrize("settings", [{"ngroups": 2}, {"rope_fraction": 1.0, "is_outproj_norm": True}])
@torch.no_grad()
def test_the_measured_states_read_out_are_the_recurrence(settings: dict[str, Any], monkeypatch: Any) -> None:
    model, data = stack(**settings), torch.randn(2, 11, WIDTH)
    found: list[Tensor] = []

    def spy(**given: Any) -> Tensor:
        found.append(mamba3_siso_combined(**{**given, "D": None, "Z": None}))
        return mamba3_siso_combined(**given)

    monkeypatch.setitem(Mamba3.forward.__globals__, "mamba3_siso_combined", spy)
    model(data)
    monkeypatch.undo()
    ((signals,),) = signals_of(model, {"hidden": data})
    states = torch.cat(list(signals.states))  # (length, batch, heads, head_dim, N)
    read = torch.einsum("lbhpn,blhn->blhp", states, signals.C)
    assert (read - found[0]).norm() <= EXACT * found[0].norm()
    assert signals.gain.shape == read.transpose(0, 1).shape
    assert bool((signals.gain > 0).all())


@torch.no_grad()
def test_pairs_that_are_never_read_go_without_a_trace() -> None:
    """Of two turning pairs the first, of two others the last; twins of those that stay, as the norms see them."""
    model, data = stack(8, ngroups=2), torch.randn(4, 40, WIDTH)
    layer = model.layers[0]
    dead, twins = torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])
    before, vectors = 2 * layer.d_inner, layer.d_state
    for start in range(before, before + 4 * vectors, vectors):  # B of two groups, C of two groups
        layer.in_proj.weight[start + dead] = layer.in_proj.weight[start + twins]
    layer.C_norm.weight[dead] = 0
    layer.C_bias[..., dead] = 0
    angles = layer.in_proj.weight[-2:].clone()
    error, predicted = cut(model, 4, data)
    assert predicted < 1e-3
    assert error < EXACT
    assert torch.equal(layer.in_proj.weight[-1:], angles[1:])
    assert layer.num_rope_angles == 1
    assert layer.split_tensor_size == 2


@pytest.mark.parametrize("size", [12, 8, 4])
@pytest.mark.parametrize("settings", [{"ngroups": 2}, {"rope_fraction": 1.0}])
def test_the_error_is_near_the_predicted_one_and_below_that_of_any_pairs(size: int, settings: dict[str, Any]) -> None:
    data = torch.randn(4, 64, WIDTH)
    model = stack(**settings)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    error, predicted = cut(model, size, data)
    other = stack(**settings)
    other.load_state_dict(weights)
    by_chance, _ = cut(other, size, data, keep="random")
    assert 0 < error < predicted < error + NEAR
    assert error < by_chance


def test_what_the_norms_divide_by_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With B's strong states gone, its norm divides by less, and the rest of them would be too loud."""
    data, errors = torch.randn(4, 64, WIDTH), []
    weights: dict[str, Tensor] = {}
    for fits in (True, False):
        model = stack(noise=0.1)
        with torch.no_grad():
            layer = model.layers[0]
            layer.in_proj.weight[2 * layer.d_inner + 12 : 2 * layer.d_inner + 16] *= 10
            layer.C_norm.weight[12:] = 0
            layer.C_bias[..., 12:] = 0
        weights = weights or {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(weights)
        if not fits:
            monkeypatch.setattr(mamba3.Mamba3Family, "changes", mamba3.SelectiveFamily.changes)
        errors.append(cut(model, 8, data)[0])
    assert errors[0] < 0.8 * errors[1]


def test_a_norm_that_nothing_makes_up_for_breaks_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stack(8), torch.randn(2, 9, WIDTH)
    (layer,) = find_layers(model)
    check_laws(mamba3_family(layer), layer.module, (data,), {})
    monkeypatch.setattr(mamba3.Mamba3Family, "normalizes", False)
    with pytest.raises(LayoutError, match="the law of smaller: with 4 states it gives something else"):
        check_laws(mamba3_family(layer), layer.module, (data,), {})


def mamba3_family(layer: SSMLayer) -> mamba3.Mamba3Family:
    assert isinstance(layer.family, mamba3.Mamba3Family)
    return layer.family


def test_sizes_are_those_of_whole_pairs_of_both_kinds() -> None:
    model = stack(24)
    compress(model, CompreSSMConfig(target_state_size=9), [{"hidden": torch.randn(2, 40, WIDTH)}])
    assert model.layers[0].d_state == 12
    model = stack(24, rope_fraction=1.0)
    compress(model, CompreSSMConfig(target_state_size=9), [{"hidden": torch.randn(2, 40, WIDTH)}])
    assert model.layers[0].d_state == 10


def test_texts_in_one_row_are_refused() -> None:
    model, data = stack(8), torch.randn(1, 40, WIDTH)

    def forward(module: Any, batch: Any) -> None:
        module.layers[0](batch, cu_seqlens=torch.tensor([0, 10, 40]))

    with pytest.raises(ValueError, match="several texts"):
        collect_statistics(model, find_layers(model), [CutMethod("empirical")], [data], forward)


def test_layers_with_several_inputs_per_head_are_left_alone_with_a_reason() -> None:
    model = ready.Stack([Mamba3(WIDTH, 8, headdim=6, is_mimo=True, mimo_rank=2)])
    assert [layer.family.name for layer in find_layers(model)] == ["mamba3"]
    result = compress(model, CompreSSMConfig(target_state_size=4), [{"hidden": torch.randn(2, 40, WIDTH)}])
    assert not result.changed
    assert "MIMO" in result.plan.layers[0].reason
