"""Layers that are measured one after the other, and the loss of a plan, by running it."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, analyze, compress, plan_compression
from hf_compressm.families import CutMethod, collect_statistics, find_layers
from hf_compressm.families.standing_in import standing_in
from hf_compressm.surgery import commit_replacements, prepare_replacements
from hf_compressm.utils.processes import Processes
from tests.family_table import (
    BAMBA,
    MAMBA,
    MAMBA2,
    QWEN3_NEXT,
    Family,
    family_id,
    outputs,
    same,
    snapshot,
    token_batch,
)


one_of_each_kind = pytest.mark.parametrize("family", [MAMBA, MAMBA2, BAMBA, QWEN3_NEXT], ids=family_id)
ROUND_OFF = {"rtol": 1e-9, "atol": 1e-12}
TWO = Processes(rank=0, size=2)
SETTINGS = {"target_state_size": 4, "refit_steps": 0, "per_layer": False}


def batches(count: int = 2) -> list[dict[str, Any]]:
    """Batches with labels."""
    drawn = [token_batch(seed=seed) for seed in range(count)]
    return [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in drawn]


def planned(model: nn.Module, **settings: Any) -> Any:
    return analyze(model, CompreSSMConfig(**{**SETTINGS, **settings}), batches())


@one_of_each_kind
def test_a_layer_stands_in_as_a_cut_would_make_it(family: Family) -> None:
    model = family.build()
    plan = planned(model)
    layer, cut = plan.layers[0].layer, plan.layers[0].cut
    before, plain = snapshot(model), outputs(model, token_batch())
    with standing_in(layer, cut):
        through = outputs(model, token_batch())
    assert same(snapshot(model), before)
    assert "forward" not in vars(layer.module)
    assert torch.equal(outputs(model, token_batch()), plain)
    commit_replacements(prepare_replacements(model, cut.changes), cut.attributes)
    torch.testing.assert_close(outputs(model, token_batch()), through)
    assert not torch.equal(through, plain)


@one_of_each_kind
def test_every_layer_is_measured_behind_those_that_are_cut(family: Family) -> None:
    model = family.build(torch.float64)
    (first, second), (_, alone) = planned(model, sequential=True).layers, planned(model).layers
    layers, method = find_layers(model), CutMethod(second.criterion)
    with standing_in(layers[0], first.cut):
        (seen,) = collect_statistics(model, layers[1:], [method], batches())
    behind = layers[1].family.measure(layers[1], method, seen)
    torch.testing.assert_close(second.hankel_singular_values, behind.hankel_singular_values, **ROUND_OFF)
    cut = layers[1].family.cut(layers[1], method, behind, 4)
    for change, expected in zip(second.cut.changes, cut.changes, strict=True):
        torch.testing.assert_close(change.value, expected.value, **ROUND_OFF)
    assert not torch.allclose(second.hankel_singular_values, alone.hankel_singular_values, rtol=1e-6)


def test_the_model_is_left_alone_by_a_measurement_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MAMBA2.build()
    before = snapshot(model)
    second = find_layers(model)[1]
    calls = []

    def fails(*args: Any) -> Any:
        calls.append(None)
        if len(calls) > 2:  # the first pass has two batches
            raise RuntimeError("no more")

    handle = second.module.register_forward_hook(fails)
    with pytest.raises(ValueError, match="no more"):
        planned(model, sequential=True)
    handle.remove()
    assert same(snapshot(model), before)
    assert not any("forward" in vars(layer.module) for layer in find_layers(model))


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequential=True measures in one process, and 2 train"):
        plan_compression(MAMBA2.build(), CompreSSMConfig(**SETTINGS, sequential=True), batches(), processes=TWO)


def test_batches_may_come_from_a_generator_and_one_batch_is_refused() -> None:
    model = MAMBA2.build()
    settings = CompreSSMConfig(**SETTINGS, sequential=True)
    once = analyze(model, settings, (batch for batch in batches()))
    assert once.to_dict() == analyze(model, settings, batches()).to_dict()
    with pytest.raises(ValueError, match=r"Pass \[batch\]"):
        analyze(model, settings, batches()[0])


@one_of_each_kind
def test_the_loss_of_a_plan_is_that_of_the_cut_model(family: Family) -> None:
    model = family.build(torch.float64)
    settings = CompreSSMConfig(**SETTINGS, criterion="fisher")
    data = batches()

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(model.eval()(**batch).loss) for batch in data) / len(data)

    before, uncut = mean_loss(), snapshot(model)
    plan = analyze(model, settings, data)
    assert same(snapshot(model), uncut)
    compress(model, settings, data)
    assert plan.predicted_loss_change == pytest.approx(mean_loss() - before, abs=1e-9)
    assert f"loss: {plan.predicted_loss_change:+.4f} expected" in str(plan)
    assert plan.to_dict()["predicted_loss_change"] == plan.predicted_loss_change


def test_a_plan_without_a_look_at_the_loss_says_nothing_of_it() -> None:
    plan = planned(MAMBA2.build())
    assert plan.predicted_loss_change is None
    assert "predicted_loss_change" not in plan.to_dict()
    assert "expected" not in str(plan)


def test_a_plan_that_cuts_nothing_leaves_the_loss_as_it_is() -> None:
    plan = planned(MAMBA2.build(), target_state_size=8, criterion="fisher")
    assert not plan.changes
    assert plan.predicted_loss_change == 0
