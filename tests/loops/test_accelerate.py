"""Loops of Accelerate: prepared models and optimizers, accumulated gradients, its checkpoints, and two processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from hf_compressm import Compressor
from hf_compressm.scans import disable_fast_selective_scan
from tests.family_table import LRU, MAMBA, Family, family_id, same
from tests.loop_runs import batches_of, state_of
from tests.trainers import HALVE


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "accelerate_configs" / "cpu.yaml"


@pytest.fixture(autouse=True)
def plain_process() -> Iterator[None]:
    yield
    disable_fast_selective_scan()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(family: Family, folder: Path, settings: Any = HALVE, **kwargs: Any) -> tuple[Any, ...]:
    """Accelerator, model, optimizer, Compressor and batches."""
    accelerator = Accelerator(cpu=True, project_dir=str(folder), **kwargs)
    model = family.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    compressor = Compressor(model, settings, optimizer, total_steps=8)
    accelerator.register_for_checkpointing(compressor)
    return accelerator, model, optimizer, compressor, batches_of(family)


def train(parts: tuple[Any, ...], begin: int, end: int, after: Any = lambda: None) -> None:
    accelerator, model, optimizer, compressor, batches = parts
    for number in range(begin, end):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batches[number % len(batches)]).loss)
            optimizer.step()
            optimizer.zero_grad()
            compressor.step()
        after()


@pytest.mark.parametrize("family", [MAMBA, LRU], ids=family_id)
def test_a_prepared_model_is_cut_with_its_optimizer(family: Family, tmp_path: Path) -> None:
    parts = prepared(family, tmp_path, {**HALVE, "rewarmup_steps": 2})
    train(parts, 0, 6)
    _, model, optimizer, compressor, batches = parts
    assert [(event.step, event.outcome) for event in compressor.events] == [(2, "cut")]
    plain = family.build().train()
    own = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    its = Compressor(plain, {**HALVE, "rewarmup_steps": 2}, own)
    for batch in batches[:6]:
        plain(**batch).loss.backward()
        own.step()
        own.zero_grad()
        its.step()
    assert same(state_of(model, optimizer), state_of(plain, own))


def test_steps_that_only_accumulate_do_not_count(tmp_path: Path) -> None:
    seen: list[int] = []
    parts = prepared(MAMBA, tmp_path, gradient_accumulation_steps=2)
    train(parts, 0, 6, lambda: seen.append(parts[3].steps))
    assert seen == [0, 1, 1, 2, 2, 3]
    assert [event.step for event in parts[3].events] == [2]


def test_mixed_precision_is_measured_as_it_is_trained(tmp_path: Path) -> None:
    parts = prepared(MAMBA, tmp_path, {**HALVE, "max_loss_increase": 100.0}, mixed_precision="bf16")
    train(parts, 0, 4)
    assert [event.outcome for event in parts[3].events] == ["cut"]


def test_accelerates_own_checkpoints_resume_across_a_cut(tmp_path: Path) -> None:
    whole = prepared(MAMBA, tmp_path)
    train(whole, 0, 4)
    whole[0].save_state(str(tmp_path / "saved"))
    train(whole, 4, 8)
    resumed = prepared(MAMBA, tmp_path)
    accelerator, model, optimizer, compressor, _ = resumed

    def take_sizes(models: list[Any], folder: str) -> None:
        compressor.load_state_dict(torch.load(Path(folder) / "custom_checkpoint_0.pkl", weights_only=True))

    accelerator.register_load_state_pre_hook(take_sizes)
    accelerator.load_state(str(tmp_path / "saved"))
    train(resumed, 4, 8)
    assert same(state_of(model, optimizer), state_of(whole[1], whole[2]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saw."""
    folder = tmp_path_factory.mktemp("launched")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "launched_loop.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_cut_alike_and_average_gradients_after_it(found: list[dict[str, Any]]) -> None:
    first, second = found
    for name in ("mamba", "lru", "guard", "stable", "resumed"):
        assert first[name]["outcomes"] == second[name]["outcomes"]
        assert "cut" in first[name]["outcomes"]
        assert same(first[name]["state"], second[name]["state"])
    assert first["guard"]["outcomes"] == ["undone", "cut"]
    assert same(first["resumed"]["state"], first["mamba"]["state"])


@pytest.mark.slow
def test_two_processes_end_as_one_that_accumulates_twice_as_much(found: list[dict[str, Any]], tmp_path: Path) -> None:
    parts = prepared(MAMBA, tmp_path, gradient_accumulation_steps=2)
    train(parts, 0, 12)
    sizes = [event.sizes for event in parts[3].events]
    assert sizes == [dict(event) for event in found[0]["mamba"]["sizes"]]
    for name, value in parts[1].state_dict().items():
        torch.testing.assert_close(found[0]["mamba"]["state"]["weights"][name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_model_that_is_not_prepared_is_refused_in_two_processes(found: list[dict[str, Any]]) -> None:
    assert all("2 processes without DistributedDataParallel" in one["refused"] for one in found)
