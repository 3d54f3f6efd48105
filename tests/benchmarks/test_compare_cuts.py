"""The benchmark of cuts runs, and what the README says of the criteria holds on briefly trained models."""

import argparse
import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig, LRUConfig, LRUForSequenceClassification, compress
from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "compare_cuts.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_cuts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    paths = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = paths
    return module


@pytest.fixture(autouse=True)
def stock_scan():
    yield
    disable_fast_selective_scan()


def options(**kwargs: Any) -> argparse.Namespace:
    defaults = {"model": "lru", "mnist_dir": None, "train_file": None, "state_size": 64, "batch_size": 16}
    return argparse.Namespace(**defaults | kwargs)


def added_losses(script: ModuleType, task: tuple, size: int, cuts: dict[str, dict]) -> dict[str, float]:
    model, batch, held_out = task
    before = script.evaluate(model, held_out)
    calibration = [batch() for _ in range(4)]
    added = {}
    for name, settings in cuts.items():
        cut = copy.deepcopy(model)
        compress(cut, CompreSSMConfig(target_state_size=size, **settings), calibration)
        added[name] = script.evaluate(cut, held_out) - before
    return added


def test_the_table_is_printed(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    _, batch, held_out = script.image_task(options(batch_size=4))
    config = LRUConfig(input_size=1, hidden_size=8, state_size=32, num_hidden_layers=1, num_labels=10)
    model = LRUForSequenceClassification(config)
    script.train(model, batch, steps=1, learning_rate=1e-3)
    script.compare(model, batch, held_out[:1], {"empirical": {"criterion": "empirical"}})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == "| kept of 32 | empirical |"
    assert [row.split()[1] for row in rows[2:]] == ["16", "8", "4", "2", "1"]


@pytest.mark.slow
def test_an_interpolated_cut_adds_at_most_half_the_loss_of_the_surrogate(script: ModuleType) -> None:
    enable_fast_selective_scan()
    task = script.text_task(options(batch_size=8))
    script.train(task[0], task[1], steps=150, learning_rate=2e-3)
    for size in (32, 16):
        added = added_losses(script, task, size, script.SELECTIVE_CUTS)
        assert added["interpolated"] <= added["surrogate (paper)"] / 2


@pytest.mark.slow
def test_balancing_against_the_data_hurts_least_at_a_sixteenth_of_the_states(script: ModuleType) -> None:
    torch.manual_seed(0)
    task = script.image_task(options(batch_size=50))
    script.train(task[0], task[1], steps=600, learning_rate=2e-3)
    added = {name: abs(loss) for name, loss in added_losses(script, task, 16, script.LINEAR_CUTS).items()}
    assert added["empirical"] < added["real"] < added["complex (paper)"]
