"""The benchmark of matrix-valued states: rows resume, comparators keep what they say, errors are of the layers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_compressm.families import find_layers


ROUNDING = 1e-5
"""Relative, of float32 figures."""


@pytest.fixture
def training(part: Any) -> Any:
    module = part("small_training")
    task = module.recall(keys=4, shown=8, rows=2, held_out=1)
    torch.manual_seed(0)
    return module.Training(task, 0, part("small_models").delta_net(8, 16, task.vocab_size))


def test_rows_are_written_told_and_passed_over(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = part("compare_matrix")
    arms = (*(arm for arm in script.ARMS if arm.name == "rank-revealing QR"), part("cut_arms").Arm("odd", {"a": 1}))
    monkeypatch.setattr(script, "ARMS", arms)
    command = ["--smoke", "--tasks", "recall", "--output", str(tmp_path)]
    command += ["--only", "uncut", "*QR to ?", "odd to *", "*at 0.5 of training", "small*"]
    script.main(command)
    told = capsys.readouterr().out
    done = part("rows").Results(tmp_path).read()
    assert len(done) == 4
    assert told.count("left out, there is no setting a") == 1
    assert all(
        f"| {name} | " in told for name in ("uncut: before, later", "rank-revealing QR", "small from the start")
    )
    cut = done["recall-rank-revealing_QR_to_2-seed0"]
    assert len(cut["measured"]) == len(cut["predicted"]) == 2
    assert done["recall-uncut-seed0"]["before"]["loss"] > done["recall-uncut-seed0"]["then"]["loss"]

    monkeypatch.setattr(script.Matrix, "trained", None)  # nothing may run again
    script.main(command)
    assert "| rank-revealing QR | 0 |" in capsys.readouterr().out
    assert part("rows").Results(tmp_path).read() == done


def test_a_training_goes_on_where_it_was_saved(part: Any, training: Any, tmp_path: Path) -> None:
    training.until(2)
    training.save(tmp_path)
    other = part("small_training").Training.load(training.task, 0, tmp_path)
    for one in (training, other):
        one.until(4)
    assert training.figures() == other.figures()


def test_rank_revealing_qr_keeps_independent_channels_of_every_head(part: Any) -> None:
    torch.manual_seed(0)
    independent = torch.randn(50, 2, 3, dtype=torch.float64)
    doubled = torch.cat([0.9 * independent, independent], dim=2)[:, :, [0, 3, 1, 4, 2, 5]]
    measured = SimpleNamespace(detail=SimpleNamespace(samples={"B": doubled, "C": doubled + 0}))
    orders = part("channel_orders").by_rank_revealing_qr(None, measured)
    for head, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(6))
        assert int(torch.linalg.matrix_rank(doubled[:, head, order[:3]])) == 3
        assert all(channel % 2 for channel in order[:3].tolist())  # the larger one of a pair comes first


def test_another_order_decides_which_channels_stay(part: Any, training: Any) -> None:
    arms = part("cut_arms")
    families = [type(layer.family) for layer in find_layers(training.model)]
    before = training.model.model.layers[0].linear_attn.in_proj_qkv.weight.detach().clone()
    last = torch.arange(7, -1, -1).expand(2, 8)
    arms.cut(training, arms.Arm("last", {"refit_steps": 0}, order=lambda layer, measured: last), 3, 1)
    after = training.model.model.layers[0].linear_attn.in_proj_qkv.weight
    kept = [head * 8 + channel for head in range(4) for channel in (5, 6, 7)]  # two heads of queries, two of keys
    torch.testing.assert_close(after[:12], before[kept], rtol=0, atol=0)
    assert [type(layer.family) for layer in find_layers(training.model)] == families


def test_the_relative_error_is_that_of_the_layer_on_the_same_inputs(part: Any, training: Any) -> None:
    errors = part("layer_errors")
    seen = errors.outputs_of_layers(training.model, training.task.held_out)
    assert errors.relative_errors(training.model, seen) == [0.0, 0.0]
    with torch.no_grad():
        training.model.model.layers[0].linear_attn.out_proj.weight.mul_(1.25)
    assert errors.relative_errors(training.model, seen) == pytest.approx([0.25, 0.0], rel=ROUNDING)
