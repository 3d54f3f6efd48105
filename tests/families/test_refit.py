"""Mamba-2 layers that are fitted after a cut: nearer to what they were, in their class, with the moments they had."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.mamba2 import modeling_mamba2

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.families import CutMethod, Mamba2Family, collect_statistics, find_layers
from hf_compressm.families.refit import tried
from hf_compressm.families.running import measured_error
from hf_compressm.numerics.interpolation import pivoted_selection
from hf_compressm.scans import disable_fast_selective_scan, dispatchers
from tests.family_table import BAMBA, MAMBA2, Family, family_id, outputs, ssm_layers, token_batch


stock = pytest.mark.parametrize("family", [MAMBA2, BAMBA], ids=family_id)
STEPS = 25
SHOWN = {"mamba2": 1.0, "bamba": 0.05}
DATA = [token_batch(32, 16, seed=3)]
OTHERS = {"A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"}


def plain(family: Family, **kwargs: Any) -> Any:
    """A model as it is initialised, with larger matrices and states that matter: a refit of its cut layers helps."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = family.model_class(family.config(state_size=16, **kwargs)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        for layer in ssm_layers(model).values():
            layer.D.mul_(SHOWN[family.name])  # what passes by the states would hide them
    return model


def plan_of(model: nn.Module, **settings: Any) -> Any:
    return analyze(model, CompreSSMConfig(**{"target_state_size": 6, **settings}), DATA)


def trained(model: nn.Module) -> torch.optim.AdamW:
    """An optimizer with moments for every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@stock
def test_a_refit_brings_every_layer_nearer_to_what_it_was(family: Family) -> None:
    model = plain(family)
    layers = find_layers(model)
    fitted = plan_of(model, refit_steps=STEPS).layers
    for layer, plan in zip(layers, fitted, strict=True):
        (seen,) = collect_statistics(model, [layer], [CutMethod("empirical", refit_steps=1)], DATA)
        unfitted = plan_of(model, refit_steps=0).layers[layers.index(layer)].cut
        before, after = (measured_error(layer, cut, seen.examples) for cut in (unfitted, plan.cut))
        assert after < 0.9 * before
        names = {change.name.removeprefix(f"{plan.name}.") for change in plan.cut.changes}
        assert {"in_proj.weight", "conv1d.weight"} < names
        assert names - {"in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "out_proj.bias"} <= OTHERS


@stock
def test_parameters_without_states_keep_their_moments_and_places(family: Family) -> None:
    model = plain(family)
    optimizer = trained(model)
    layer = next(iter(ssm_layers(model).values()))
    before = copy.deepcopy({name: optimizer.state[getattr(layer, name)] for name in ("D", "A_log", "dt_bias")})
    values = {name: getattr(layer, name).detach().clone() for name in before}
    compress(model, CompreSSMConfig(target_state_size=6, refit_steps=STEPS), DATA, optimizer=optimizer)
    for name, state in before.items():
        assert not torch.equal(getattr(layer, name), values[name]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[getattr(layer, name)][moment], state[moment]), name
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


@stock
def test_a_fitted_model_is_an_ordinary_one(family: Family, tmp_path: Path) -> None:
    model = plain(family)
    compress(model, CompreSSMConfig(target_state_size=6, refit_steps=STEPS), DATA)
    assert type(model) is family.model_class
    model.save_pretrained(tmp_path)
    loaded = family.model_class.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, token_batch()), outputs(model, token_batch()))


def test_projections_are_fitted_fastest_where_there_are_any() -> None:
    model = MAMBA2.build()
    compress(model, CompreSSMConfig(target_state_size=4, compat="best", refit_steps=0), DATA)
    layer = find_layers(model)[0]
    paces = {id(tensor): pace for tensor, pace in layer.family.fitted(layer.module)}
    found = {name: paces[id(parameter)].unique().tolist() for name, parameter in layer.module.named_parameters()}
    fastest = {name for name, values in found.items() if values == [1.0]}
    assert fastest == {"B_proj", "C_proj"}
    assert all(len(values) == 1 and 0 < values[0] < 1 for name, values in found.items() if name not in fastest)


def test_adapters_and_what_they_wrap_without_states_stay_as_they_are() -> None:
    base = plain(BAMBA)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items() if "out_proj" in name}
    compress(model, CompreSSMConfig(target_state_size=6, refit_steps=STEPS), DATA)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_states_are_kept_from_which_the_others_can_be_read() -> None:
    model = plain(MAMBA2)
    layer = find_layers(model)[0]
    assert isinstance(layer.family, Mamba2Family)
    method = CutMethod("empirical", refit_steps=1)
    (seen,) = collect_statistics(model, [layer], [method], DATA)
    orders = layer.family.measure(layer, method, seen).detail.for_fit
    for order, P, Q in zip(orders, seen.mean("P"), seen.mean("Q"), strict=True):
        assert torch.equal(order, pivoted_selection(P, Q)[0])
    unfitted = layer.family.measure(layer, CutMethod("empirical"), seen).detail
    assert unfitted.for_fit is None
    assert not torch.equal(orders, unfitted.orders)


def test_a_fit_that_gains_nothing_leaves_the_cut_that_is_best_without_one() -> None:
    model = plain(MAMBA2)
    without, (layer, *_) = plan_of(model, refit_steps=0).layers[0], find_layers(model)
    (seen,) = collect_statistics(model, [layer], [CutMethod("empirical", refit_steps=1)], DATA)
    measurement = layer.family.measure(layer, CutMethod("empirical", refit_steps=1), seen)
    start = layer.family.cut(layer, CutMethod("empirical", refit_steps=1), measurement, 6)
    values = [change.value for change in without.cut.changes]
    assert not all(torch.equal(one.value, other) for one, other in zip(start.changes, values, strict=True))
    nothing = [replace(change, value=torch.full_like(change.value, torch.nan)) for change in start.changes]
    kept = tried(layer, without.cut, seen.examples, 2, replace(start, changes=tuple(nothing)))
    assert all(torch.equal(one.value, other) for one, other in zip(kept.changes, values, strict=True))


def test_a_fit_runs_on_the_fast_scan_and_leaves_the_stock_one_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    disable_fast_selective_scan()
    model, calls, scan = MAMBA2.build(), [], dispatchers.ssd_scan
    monkeypatch.setattr(dispatchers, "ssd_scan", lambda *args, **kwargs: calls.append(None) or scan(*args, **kwargs))
    stock_scan = modeling_mamba2.mamba2_chunk_scan
    plan_of(model, refit_steps=3)
    assert len(calls) > 2 * 3  # two layers
    assert modeling_mamba2.mamba2_chunk_scan is stock_scan
    seen = len(calls)
    outputs(model, token_batch())
    assert len(calls) == seen
