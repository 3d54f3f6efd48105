"""Methods of a Trainer are wrapped once, whoever asks, and by name."""

from pathlib import Path
from typing import Any

import pytest

from hf_compressm.training.trainer import calling_trainer, run_folder, wrap_methods
from tests.family_table import LRU
from tests.trainers import trainer_of


def test_a_handler_is_called_with_the_method_and_the_arguments(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, None)
    seen: list[Any] = []

    def handler(method: Any, logs: dict[str, float], *args: Any) -> None:
        seen.append((logs, args))
        method(logs | {"more": 1.0}, *args)

    wrap_methods(trainer, {"log": handler})
    trainer.log({"loss": 2.0})
    assert seen == [({"loss": 2.0}, ())]
    assert trainer.state.log_history[-1]["more"] == 1.0


def test_a_second_handler_takes_the_place_of_the_first(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, None)
    called: list[str] = []
    for name in ("first", "second"):
        wrap_methods(trainer, {"log": lambda method, logs, name=name: (called.append(name), method(logs))})
    trainer.log({"loss": 1.0})
    assert called == ["second"]
    assert len(trainer.state.log_history) == 1


def test_a_method_that_is_not_there_is_named_and_nothing_is_wrapped(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, None)
    with pytest.raises(ValueError, match=r"no Trainer\._load_the_moon"):
        wrap_methods(trainer, {"log": lambda method: None, "_load_the_moon": lambda method: None})
    assert "log" not in vars(trainer)


def test_a_trainer_is_found_from_inside_one_of_its_calls_only(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, None)
    found: list[Any] = []
    wrap_methods(trainer, {"log": lambda method, logs: found.append(calling_trainer())})

    class Caller(type(trainer)):
        def tell(self) -> None:
            self.log({"loss": 1.0})

    trainer.__class__ = Caller
    trainer.tell()
    assert found == [trainer]
    assert calling_trainer() is None
    assert run_folder(trainer) == tmp_path
