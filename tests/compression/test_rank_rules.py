"""A budget over layers: the same bytes of state in all, each layer as many as it needs."""

import pytest
import torch

from hf_compressm import CompreSSMConfig, analyze, compress
from tests.compression.test_own_classes import state_sizes, uneven
from tests.family_table import LRU, MAMBA, MAMBA2, S5, Family, family_id, token_batch


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches with labels."""
    drawn = [token_batch(length=24, seed=seed)["input_ids"] for seed in range(count)]
    return [{"input_ids": each, "labels": each} for each in drawn]


class Chain(torch.nn.Module):
    """Layers one after the other, in a model without a configuration."""

    def __init__(self, layers: torch.nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = torch.nan_to_num(layer(hidden_states))
        return hidden_states


def share_kept(plan: object) -> float:
    """Bytes of state after a cut over those before it."""
    sizes = [layer.state_bytes for layer in plan.layers]  # type: ignore[attr-defined]
    return sum(after for _, after in sizes) / sum(before for before, _ in sizes)


@pytest.mark.parametrize("criterion", ["auto", "fisher"])
@pytest.mark.parametrize("family", [MAMBA, MAMBA2], ids=family_id)
def test_a_layer_with_fewer_states_that_matter_gives_its_bytes_to_the_other(family: Family, criterion: str) -> None:
    model = uneven(family)
    settings = CompreSSMConfig(budget=0.7, compat="best", criterion=criterion, refit_steps=0)
    plan = analyze(model, settings, batches())
    first, second = (layer.new_state_size for layer in plan.layers)
    assert share_kept(plan) <= 0.7
    assert first < second
    compress(model, settings, batches())
    assert state_sizes(model) == [first, second]


@pytest.mark.parametrize("family", [S5, LRU], ids=family_id)
def test_layers_without_data_have_a_budget_too(family: Family) -> None:
    plan = analyze(family.build(), CompreSSMConfig(budget=0.5, criterion="hankel"))
    assert 0 < share_kept(plan) <= 0.5


def test_layers_of_one_size_all_keep_the_same_share() -> None:
    plan = analyze(MAMBA2.build(), CompreSSMConfig(budget=0.5, refit_steps=0), batches())
    assert {layer.new_state_size for layer in plan.layers} == {4}


def test_a_budget_goes_with_the_sizes_that_are_allowed() -> None:
    settings = CompreSSMConfig(budget=0.8, compat="best", refit_steps=0, sizes=[2, 4, 8], criterion="fisher")
    plan = analyze(uneven(MAMBA2), settings, batches())
    assert {layer.new_state_size for layer in plan.layers} <= {2, 4, 8}
    assert share_kept(plan) <= 0.8


def test_a_layer_that_cannot_be_measured_keeps_its_states() -> None:
    model = uneven(MAMBA2)
    with torch.no_grad():
        model.backbone.layers[1].mixer.D.fill_(torch.nan)
    plan = analyze(model, CompreSSMConfig(budget=0.7, compat="best", refit_steps=0), batches())
    assert plan.layers[1].status == "skipped"
    assert plan.layers[1].new_state_size == 8
    assert share_kept(plan) <= 0.7


def test_layers_of_a_model_of_ones_own_share_a_budget_whatever_size_they_have() -> None:
    small, large = MAMBA2.build(state_size=4), MAMBA2.build(state_size=8)
    model = torch.nn.ModuleList([small.backbone.layers[0].mixer, large.backbone.layers[1].mixer])
    with torch.no_grad():
        model[1].D.fill_(torch.nan)
    data = [torch.randn(4, 24, 16)]
    settings = CompreSSMConfig(budget=0.6, per_layer=False, refit_steps=0)
    plan = analyze(Chain(model), settings, data)
    assert [layer.new_state_size for layer in plan.layers] == [4, 8]
    plan = analyze(Chain(model[:1]), settings, data)
    assert [layer.new_state_size for layer in plan.layers] == [2]


def test_too_few_tokens_share_out_nothing() -> None:
    plan = analyze(uneven(MAMBA2), CompreSSMConfig(budget=0.5, refit_steps=0), [token_batch(1, 3)])
    assert not plan.changes
    assert all("cannot rank 8 states" in layer.reason for layer in plan.layers)


@pytest.mark.parametrize("value", [0, 1, -0.5, "half"])
def test_a_budget_is_a_share(value: object) -> None:
    with pytest.raises(ValueError, match=r"budget.*share of the bytes"):
        CompreSSMConfig(budget=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Exactly one of .*budget"):
        CompreSSMConfig(budget=0.5, fraction=0.5)
