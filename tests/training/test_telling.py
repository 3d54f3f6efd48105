"""A person reads a sentence about a cut; the log, trackers and callbacks of one's own get every number."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, TrainerCallback

from tests.family_table import LRU
from tests.trainers import trainer_of


SENTENCE = "CompreSSM, cut after step 2: 2 of 2 layers, 8 -> 4 states, "


class Collects(TrainerCallback):
    """A tracker of one's own."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Shows(Collects):
    """A display of one's own, as trl has one."""

    training_bar = None


def about_cuts(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in logs if "compressm/cut" in entry]


@pytest.mark.parametrize("disable_tqdm", [True, False], ids=["lines", "bars"])
def test_the_printed_line_is_a_sentence(disable_tqdm: bool, tmp_path: Path, capsys: Any) -> None:
    collects = Collects()
    trainer = trainer_of(LRU, tmp_path, disable_tqdm=disable_tqdm, callbacks=[collects])
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert sum(SENTENCE in line for line in lines) == 1
    assert not any("compressm/layer" in line or "compressm/cut" in line for line in lines)
    assert sum("'loss'" in line for line in lines) == 6
    (logged,) = about_cuts(trainer.state.log_history)
    (tracked,) = about_cuts(collects.logs)
    assert logged["compressm/layer_01/state_size"] == tracked["compressm/layer_01/state_size"] == 4
    assert logged == {**tracked, "step": 2}


def test_displays_of_others_are_passed_over_and_left_as_they_were(tmp_path: Path, capsys: Any) -> None:
    shows, printer = Shows(), PrinterCallback()
    seen: list[dict[str, Any]] = []
    own = lambda args, state, control, logs=None, **kwargs: seen.append(logs)  # noqa: E731 - a method of the instance
    vars(printer)["on_log"] = own
    trainer = trainer_of(LRU, tmp_path, callbacks=[shows, printer])
    trainer.callback_handler.callbacks.append(shows)  # twice
    trainer.train()
    assert not about_cuts([*shows.logs, *seen])
    assert len(shows.logs) == 2 * len(seen) > 2
    assert vars(printer)["on_log"] is own
    assert "on_log" not in vars(shows)
    assert capsys.readouterr().out.count(SENTENCE) == 1


def test_the_display_of_trl_is_passed_over(tmp_path: Path, capsys: Any) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    rich = callbacks.RichProgressCallback()
    trainer = trainer_of(LRU, tmp_path, callbacks=[rich])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    out = capsys.readouterr().out
    assert SENTENCE in out
    assert "layer_00" not in out


def test_where_nothing_prints_the_logger_has_the_sentence(
    tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hf_compressm")
    trainer = trainer_of(LRU, tmp_path)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert SENTENCE not in capsys.readouterr().out
    assert sum(SENTENCE in message for message in caplog.messages) == 1
