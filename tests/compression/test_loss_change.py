"""The predicted change of the loss is told wherever a cut is, and nowhere where it is not known."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.compression import CompressionResult, record
from hf_compressm.compression.history import CutEvent, from_record, rollback_event, to_record
from hf_compressm.compression.log import scalars, sentence
from hf_compressm.reports import read_run
from hf_compressm.reports.tables import EXPECTED, cuts
from tests.cli.running import run
from tests.family_table import MAMBA, MAMBA2, family_id
from tests.loop_runs import Loop
from tests.trainers import HALVE, callback_of, trainer_of


FISHER = {**HALVE, "criterion": "fisher"}
KEY = "compressm/predicted_loss_change"
NAME = "predicted_loss_change"


def cut_by(criterion: str) -> CompressionResult:
    return compress(MAMBA2.build(), CompreSSMConfig(criterion=criterion, fraction=0.5), MAMBA2.calibration())


def test_events_keep_it() -> None:
    event = CutEvent(3, cut_by("fisher"))
    plan = event.result.plan
    (again,) = from_record(json.loads(json.dumps(to_record([event]))))
    assert again.result.plan.predicted_loss_change == plan.predicted_loss_change is not None
    every = [layer.predicted_loss_change for layer in again.result.plan.layers]
    assert every == [layer.predicted_loss_change for layer in plan.layers]
    assert None not in every
    assert scalars(again)[KEY] == plan.predicted_loss_change
    assert scalars(again)["compressm/layer_01/predicted_loss_change"] == every[1]
    assert f", loss {plan.predicted_loss_change:+.4f} expected" in sentence(again)


def test_where_it_is_not_known_nothing_is_said_of_it() -> None:
    event = CutEvent(3, cut_by("empirical"))
    assert NAME not in json.dumps(to_record([event]))
    assert not any(NAME in name for name in scalars(event))
    assert "expected" not in sentence(event)
    (again,) = from_record(to_record([event]))
    assert again.result.plan.predicted_loss_change is None


def test_a_rollback_predicts_nothing() -> None:
    back = rollback_event(5, CutEvent(3, cut_by("fisher")), 1.0, 2.0, 0.1)
    assert NAME not in json.dumps(back.to_dict())


@pytest.mark.parametrize("value", ["0.1", [], float("nan"), True])
def test_a_strangers_value_is_refused(value: Any) -> None:
    event = CutEvent(3, cut_by("fisher"))
    history = to_record([event])
    history["events"][0][NAME] = value
    with pytest.raises(ValueError, match=NAME):
        from_record(history)
    config = SimpleNamespace(compressm=None)
    record.record_cut(config, event.result.plan)
    assert config.compressm["cuts"][0][NAME] == event.result.plan.predicted_loss_change
    config.compressm["cuts"][0][NAME] = value
    with pytest.raises(ValueError, match=NAME):
        record.check_record(config.compressm)


@pytest.mark.parametrize(("family", "accumulated"), [(MAMBA2, 1), (MAMBA, 2)], ids=family_id)
def test_a_trainer_tells_it(family: Any, accumulated: int, tmp_path: Path) -> None:
    more = {"gradient_accumulation_steps": accumulated, "save_strategy": "steps", "save_steps": 4}
    trainer = trainer_of(family, tmp_path, FISHER, **more)
    trainer.train()
    (event,) = callback_of(trainer).events
    change = event.result.plan.predicted_loss_change
    assert event.outcome == "cut"
    assert change is not None
    assert abs(change) < 1  # of the mean loss, not of a sum over tokens
    assert [entry[KEY] for entry in trainer.state.log_history if KEY in entry] == [change]
    assert trainer.model.config.compressm["cuts"][0][NAME] == change
    trainer.save_model(str(tmp_path / "saved"))
    seen = read_run(tmp_path / "saved")
    table = cuts(seen)
    column = table.head.index(EXPECTED)
    assert [row[column] for row in table.rows] == [f"{change:+.4f}"]
    assert EXPECTED in (tmp_path / "saved" / "README.md").read_text()
    recorded = cuts(replace(seen, events=()))
    assert recorded.rows[0][recorded.head.index(EXPECTED)] == f"{change:+.4f}"


def test_a_loop_of_ones_own_tells_it() -> None:
    (event,) = Loop(MAMBA2, FISHER).run().compressor.events
    assert event.outcome == "cut"
    assert event.result.plan.predicted_loss_change is not None


def test_a_loop_without_labels_is_told_to_give_them() -> None:
    loop = Loop(MAMBA2, FISHER)
    loop.model(input_ids=loop.batches[0]["input_ids"]).logits.sum().backward()
    with pytest.raises(ValueError, match=r"criterion='fisher' need a loss.*Give it labels"):
        loop.compressor.step()


def test_the_command_line_tells_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    model, text = tmp_path / "model", tmp_path / "text.txt"
    MAMBA2.build(vocab_size=256).save_pretrained(model)
    text.write_text("All that is gold does not glitter. " * 40)
    data = ("--train-file", text, "--block-size", 32, "--criterion", "fisher")
    code, out, _ = run(capsys, "analyze", model, "--tolerances", "0.2,0.4", *data)
    assert code == 0
    assert "expected loss" in out
    found = json.loads(run(capsys, "analyze", model, "--tolerances", "0.4", "--json", *data)[1])["tolerances"][0]
    assert any(layer[NAME] is not None for layer in found["layers"] if layer["status"] == "cut")
    arguments = ("compress", model, "--tolerance", 0.4, *data, "--refit-steps", 0)
    done = json.loads(run(capsys, *arguments, "--output", tmp_path / "small", "--json")[1])
    assert done[NAME] == pytest.approx(found[NAME])
    assert f"loss {done[NAME]:+.4f} expected" in run(capsys, *arguments, "--output", tmp_path / "again")[1]
    _, out, _ = run(capsys, "analyze", model, "--tolerances", "0.4", "--train-file", text, "--block-size", 32)
    assert "expected loss" not in out
