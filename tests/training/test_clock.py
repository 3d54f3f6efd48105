"""Steps per second in the log of a run."""

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_compressm.compression.log import PACE
from hf_compressm.training.clock import StepClock
from tests.family_table import LRU
from tests.trainers import Examples, trainer_of


STEP_SECONDS = 0.05
SLOWER = 1 / 11  # of the rate that sleeping alone would give: with its evaluation a step would take 11 times as long


def test_a_clock_counts_steps_and_what_lies_between_but_not_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = StepClock()
    assert clock.take() == {}
    for interrupted in (False, False, True):
        clock.step_begins()
        now += 2
        clock.step_ends()
        if interrupted:
            clock.interrupt()
            now += 100
        now += 1  # data
    clock.step_begins()
    now += 2
    clock.step_ends()
    assert clock.take() == {PACE: 3 / (3 + 3 + 2)}  # the first step is not counted
    assert clock.take() == {}
    clock.restart()
    for _ in range(2):
        clock.step_begins()
        now += 4
        clock.step_ends()
    assert clock.take() == {PACE: 1 / 4}


class Slow(TrainerCallback):
    """Makes steps take a known time, and everything else much longer."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(STEP_SECONDS)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(10 * STEP_SECONDS)


def test_the_log_of_a_run_has_the_pace_without_evaluations(tmp_path: Path) -> None:
    often = {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 8}
    trainer = trainer_of(LRU, tmp_path, callbacks=[Slow()], eval_dataset=Examples(LRU, 2), **often)
    trainer.train()
    paces = [(entry["step"], entry[PACE]) for entry in trainer.state.log_history if PACE in entry]
    assert [step for step, _ in paces] == [2, 4, 8]  # of the cut, and of the two losses
    assert all(SLOWER / STEP_SECONDS < pace < 1 / STEP_SECONDS for _, pace in paces)
