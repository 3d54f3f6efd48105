"""Optimizer state over a cut: shapes, groups, exactness, and what is reset or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.optimization import Adafactor
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, compress
from tests.family_table import (
    LRU,
    MAMBA,
    S5,
    Family,
    by_layout,
    each,
    family_id,
    owner_of_a_cut_parameter,
    same,
    snapshot,
    ssm_layers,
    train_step,
)


class Lion(torch.optim.Optimizer):
    """One moment; written the old way, through `.data`."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moment = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.data.add_((0.9 * moment + 0.1 * parameter.grad).sign(), alpha=-group["lr"])
                moment.mul_(0.99).add_(parameter.grad, alpha=0.01)


CARRIED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "lion": Lion,
    "adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
    "adafactor beta1": lambda p: Adafactor(p, lr=1e-3, beta1=0.9, relative_step=False, scale_parameter=False),
}
RESET: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "rmsprop momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adamax": lambda p: torch.optim.Adamax(p),
    "torch adafactor": lambda p: torch.optim.Adafactor(p),
}
every_family = pytest.mark.parametrize("family", each(), ids=family_id)


@pytest.fixture
def warnings_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_compressm.surgery.optimizer"), "warning", seen.append)
    return seen


def grouped(model: Any) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as the Trainer does it, in an order of its own."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in reversed(parameters) if p.dim() <= 1], "weight_decay": 0.0},
    ]


def names_of(model: Any, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def cut(model: Any, family: Family, optimizer: Any, **settings: Any) -> Any:
    return compress(model, CompreSSMConfig(**{"fraction": 0.5, **settings}), family.calibration(), optimizer)


def moments_fit(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1:
                shapes = {parameter.shape, parameter.shape[:-1], parameter.shape[:-2] + parameter.shape[-1:]}
                assert value.shape in shapes or key in ("row_var", "col_var"), key  # torch's Adafactor keeps axes
                assert torch.isfinite(value).all()
                if "sq" in key:
                    assert (value >= 0).all()


@pytest.mark.parametrize("family", by_layout(), ids=family_id)
@pytest.mark.parametrize("kind", CARRIED.keys())
def test_state_is_carried_and_every_parameter_moves_in_the_next_step(
    family: Family, kind: str, warnings_seen: list[str]
) -> None:
    model = family.build()
    optimizer = CARRIED[kind](grouped(model))
    for _ in range(2):
        train_step(model, optimizer, family.batch())
    names, options = names_of(model, optimizer), options_of(optimizer)
    before = {name: set(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    assert cut(model, family, optimizer).changed
    assert (names_of(model, optimizer), options_of(optimizer)) == (names, options)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    assert {name: set(optimizer.state.get(p, {})) for name, p in model.named_parameters()} == before
    moments_fit(model, optimizer)
    assert warnings_seen == []
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_step(model, optimizer, family.batch(seed=1))
    assert [name for name, p in model.named_parameters() if torch.equal(p, values[name])] == []


@pytest.mark.parametrize("family", [MAMBA, LRU], ids=family_id)
@pytest.mark.parametrize("kind", [*CARRIED, *RESET])
def test_a_cut_before_the_first_step(family: Family, kind: str, warnings_seen: list[str]) -> None:
    model = family.build()
    optimizer = (CARRIED | RESET)[kind](grouped(model))
    fresh = len(optimizer.state)
    cut(model, family, optimizer)
    assert len(optimizer.state) == fresh
    train_step(model, optimizer, family.batch())
    moments_fit(model, optimizer)


@pytest.mark.parametrize("family", [MAMBA, S5, LRU], ids=family_id)
@pytest.mark.parametrize("kind", RESET.keys())
def test_state_that_is_not_understood_is_reset_with_a_warning(
    family: Family, kind: str, warnings_seen: list[str]
) -> None:
    model = family.build()
    optimizer = RESET[kind](grouped(model))
    train_step(model, optimizer, family.batch())
    kept = next(p for name, p in model.named_parameters() if name.endswith("embeddings.weight"))
    state = {key: value.clone() for key, value in optimizer.state[kept].items()}
    cut(model, family, optimizer)
    assert len(warnings_seen) == 1
    assert "reset for" in warnings_seen[0]
    assert same(dict(optimizer.state[kept]), state)
    train_step(model, optimizer, family.batch())
    moments_fit(model, optimizer)


@every_family
def test_a_reset_drops_the_state_of_cut_parameters_only(family: Family) -> None:
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, family.batch())
    old = {id(parameter) for parameter in model.parameters()}
    cut(model, family, optimizer, optimizer_state="reset")
    for parameter in model.parameters():
        assert (parameter in optimizer.state) is (id(parameter) in old)


@every_family
def test_frozen_parameters_stay_frozen_and_outside(family: Family) -> None:
    model = family.build()
    frozen = {"A_log", "B_re", "B_im", "C_re", "C_im"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] not in frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train_step(model, optimizer, family.batch())
    assert cut(model, family, optimizer).changed
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (name.rpartition(".")[2] not in frozen)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    train_step(model, optimizer, family.batch())


@every_family
def test_marks_and_hooks_survive(family: Family) -> None:
    model = family.build()
    calls: list[str] = []
    layer = next(iter(ssm_layers(model).values()))
    owner, name = owner_of_a_cut_parameter(layer)
    parameter = getattr(owner, name)
    parameter._no_weight_decay = True
    parameter.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    parameter.register_hook(lambda grad: calls.append("hooked") or 0 * grad)
    optimizer = torch.optim.AdamW(model.parameters())
    cut(model, family, optimizer)
    assert getattr(owner, name) is not parameter
    assert getattr(owner, name)._no_weight_decay
    model(**family.batch()).loss.backward()
    assert sorted(calls) == ["accumulated", "hooked"]
    assert not getattr(owner, name).grad.any()


def test_moments_of_mamba_are_slices_where_nothing_is_folded() -> None:
    model = MAMBA.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, MAMBA.batch())
    layer = next(iter(ssm_layers(model).values()))
    decay, moments = layer.A_log.detach().clone(), {k: v.clone() for k, v in optimizer.state[layer.A_log].items()}
    projection = {k: v.clone() for k, v in optimizer.state[layer.x_proj.weight].items()}
    cut(model, MAMBA, optimizer)
    kept = [int((decay - column[:, None]).abs().sum(0).argmin()) for column in layer.A_log.detach().T]
    rows = [*range(2), *[2 + i for i in kept], *[10 + i for i in kept]]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[layer.A_log][key], moments[key][:, kept])
        found = optimizer.state[layer.x_proj.weight][key]
        assert torch.equal(found[:2], projection[key][rows][:2])  # the step sizes' rows
        assert torch.equal(found[6:], projection[key][rows][6:])  # the rows of C
    assert torch.equal(optimizer.state[layer.A_log]["step"], moments["step"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_not_finite_skips_the_cut_or_raises(key: str, value: float) -> None:
    model = LRU.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, LRU.batch())
    layer = next(iter(ssm_layers(model).values()))
    optimizer.state[layer.C_im][key][0, 0] = value
    before, state = snapshot(model), optimizer.state_dict()
    with pytest.raises(ValueError, match=rf"{key}.*C_(re|im)"):
        cut(model, LRU, optimizer, on_nonfinite="raise")
    result = cut(model, LRU, optimizer)
    assert not result.changed
    assert {(layer.status, layer.new_state_size) for layer in result.plan.layers} == {("skipped", 8)}
    assert same(snapshot(model), before)
    assert same(optimizer.state_dict(), state)
    assert cut(model, LRU, optimizer, optimizer_state="reset").changed


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.optim\.Optimizer, got str"):
        cut(LRU.build(), LRU, "adamw")
