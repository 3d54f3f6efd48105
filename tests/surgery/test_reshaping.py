"""A live model takes the sizes of a skeleton, in both directions."""

import copy
from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.surgery import reshape_model, skeleton
from tests.family_table import (
    LRU,
    MAMBA,
    MAMBA2,
    MAMBA2_PLAIN,
    Family,
    each,
    family_id,
    outputs,
    same,
    snapshot,
    train_step,
)


every_family = pytest.mark.parametrize("family", each(), ids=family_id)
with_own_class = pytest.mark.parametrize("family", [MAMBA, MAMBA2, MAMBA2_PLAIN], ids=family_id)
UNEVEN = {"tolerance": 0.3, "compat": "best", "per_layer": True}


def grouped(model: Any) -> list[dict[str, Any]]:
    """Two groups, as the Trainer makes them."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def like(model: Any, other: Any, optimizer: Any = None) -> bool:
    """Give a model the sizes of another, and its weights."""
    changed = reshape_model(model, skeleton(type(other), copy.deepcopy(other.config)), optimizer)
    model.load_state_dict(other.state_dict())
    return changed


def fits(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer holds what a fresh one would, in its order, and only state that fits."""
    fresh = grouped(model)
    for group, expected in zip(optimizer.param_groups, fresh, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
        assert group["weight_decay"] == expected["weight_decay"]
    held = {id(p) for group in fresh for p in group["params"]}
    assert {id(p) for p in optimizer.state} <= held
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())


@every_family
def test_sizes_go_down_and_up_again_with_the_optimizer(family: Family) -> None:
    model, small = family.build(), family.build(seed=1)
    compress(small, CompreSSMConfig(target_state_size=4), family.calibration())
    optimizer = torch.optim.AdamW(grouped(model))
    train_step(model, optimizer, family.batch())
    model.eval()
    large = copy.deepcopy(model)
    kept = {name: p for name, p in model.named_parameters() if p.shape == dict(small.named_parameters())[name].shape}
    assert like(model, small, optimizer)
    assert torch.equal(outputs(model, family.batch()), outputs(small.eval(), family.batch()))
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in kept.items())
    assert all(parameter in optimizer.state for parameter in kept.values())
    fits(model, optimizer)
    train_step(model, optimizer, family.batch())
    assert like(model.eval(), large, optimizer)
    assert torch.equal(outputs(model, family.batch()), outputs(large, family.batch()))
    fits(model, optimizer)
    train_step(model, optimizer, family.batch())
    assert model.config.to_dict() == large.config.to_dict()


@every_family
def test_a_model_that_has_the_sizes_already_stays_what_it_is(family: Family) -> None:
    model = family.build()
    before = snapshot(model)
    assert not reshape_model(model, skeleton(type(model), copy.deepcopy(model.config)))
    assert same(snapshot(model), before)


@with_own_class
def test_a_stock_model_moves_to_its_own_class_and_back(family: Family) -> None:
    model, own = family.build(), family.build(seed=1)
    compress(own, CompreSSMConfig(**UNEVEN), family.calibration())
    stock = copy.deepcopy(model)
    assert type(own) is not type(stock)
    optimizer = torch.optim.AdamW(grouped(model))
    for target in (own.eval(), stock, own, stock):
        like(model, target, optimizer)
        assert (type(model), type(model.config)) == (type(target), type(target.config))
        assert [type(part) for part in model.modules()] == [type(part) for part in target.modules()]
        assert [set(vars(part)) for part in model.modules()] == [set(vars(part)) for part in target.modules()]
        assert torch.equal(outputs(model.eval(), family.batch()), outputs(target, family.batch()))
        assert model.config.to_dict() == target.config.to_dict()
        fits(model, optimizer)
        train_step(model, optimizer, family.batch())
        fits(model, optimizer)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@with_own_class
def test_reshaping_that_fails_half_way_leaves_all_as_before(
    family: Family, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = family.build(), family.build(seed=1)
    compress(own, CompreSSMConfig(**UNEVEN), family.calibration())
    optimizer = torch.optim.AdamW(model.parameters())
    before, held = snapshot(model), [id(p) for p in optimizer.param_groups[0]["params"]]

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("hf_compressm.surgery.reshaping._take_values", fail)
    with pytest.raises(type(error)):
        reshape_model(model, skeleton(type(own), own.config), optimizer)
    assert same(snapshot(model), before)
    assert type(model) is family.model_class
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held


def test_a_skeleton_of_another_kind_is_refused() -> None:
    model = MAMBA.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"of a LRUForCausalLM, the model is a MambaForCausalLM"):
        reshape_model(model, skeleton(LRU.model_class, LRU.config()))
    with pytest.raises(ValueError, match="3 SSM layers"):
        reshape_model(model, skeleton(MAMBA.model_class, MAMBA.config(num_hidden_layers=3)))
    assert same(snapshot(model), before)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = LRU.build(), LRU.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match="that the model does not have"):
        reshape_model(model, skeleton(type(model), LRU.config(state_size=4)), torch.optim.AdamW(other.parameters()))
    assert same(snapshot(model), before)


@every_family
def test_a_skeleton_draws_no_random_number(family: Family) -> None:
    state = torch.get_rng_state()
    model = skeleton(family.model_class, family.config())
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
