"""Two processes under `accelerate launch`: they cut alike, average gradients afterwards, and fail together."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launched_run import SCENARIOS, make, outcome


ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "accelerate_configs" / "cpu.yaml"
HURT = ("hurt-raise", "hurt-drift")
ALONE_TOO = ["s5", "s5-per-layer", "lru-empirical", "mamba", "mamba-per-layer", "stream", "stable", "lora"]
RUNS = [name for name in SCENARIOS if name != "resume"]


def launch(folder: Path, *names: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "launched_run.py"), str(folder), *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both processes saw, by scenario; one launch for all, since importing takes longer than the runs."""
    folder = tmp_path_factory.mktemp("launched")
    names = (*SCENARIOS, *HURT)
    process = launch(folder, *names)
    assert process.returncode == 0, process.stderr[-5000:]
    ranks = [{name: torch.load(folder / name / f"rank{rank}.pt") for name in names} for rank in (0, 1)]
    return {name: [rank[name] for rank in ranks] for name in names}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", RUNS)
def test_processes_stay_alike_to_the_last_bit(name: str, found: dict) -> None:
    first, second = found[name]
    assert first["seen"] == second["seen"]  # after every cut and at the end
    assert len(first["seen"]) >= 2
    assert first["losses"] == second["losses"]
    assert first["config"] == second["config"]
    assert first["outcomes"] == second["outcomes"]
    assert same_tensors(first["weights"], second["weights"])
    assert all(map(torch.equal, first["moments"], second["moments"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE_TOO)
def test_two_processes_equal_one_with_twice_the_accumulation(name: str, found: dict, tmp_path: Path) -> None:
    trainer, watch = make(name, tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    alone, both = outcome(trainer, watch), found[name][0]
    assert [(step, sizes) for step, _, sizes in alone["seen"]] == [(step, sizes) for step, _, sizes in both["seen"]]
    assert alone["outcomes"] == both["outcomes"]
    assert "cut" in alone["outcomes"]
    assert alone["losses"] == pytest.approx(both["losses"], abs=1e-5)
    for key, value in alone["weights"].items():
        torch.testing.assert_close(both["weights"][key], value, atol=1e-4, rtol=1e-4)


def test_sizes_differ_between_layers_where_they_may(found: dict) -> None:
    sizes = [set(sizes.values()) for _, _, sizes in found["mamba-per-layer"][0]["seen"] if sizes]
    assert any(len(values) > 1 for values in sizes)
    assert found["mamba-per-layer"][0]["config"]["model_type"] == "compressm_mamba"


def test_the_wrapper_of_an_earlier_run_is_used_again(found: dict) -> None:
    first, second = (rank["again"] for rank in found["lru-empirical"])
    assert first == second
    assert [step for step, _, _ in first] == [2, 5, 8, 2, 5, 8]


def test_guards_decide_once_for_all(found: dict) -> None:
    assert found["guard"][0]["outcomes"] == ["undone", "cut"]
    assert found["recovery"][0]["outcomes"] == ["cut", "rolled back"]


def test_a_run_resumes_across_a_cut_and_one_process_writes(found: dict) -> None:
    first, second = found["resume"]
    for rank in (first, second):
        assert [step for step, _, _ in rank["whole"]["seen"]] == [2, 5, 8]
        assert rank["resumed"]["seen"][-2:] == rank["whole"]["seen"][-2:]
        assert same_tensors(rank["resumed"]["weights"], rank["whole"]["weights"])
        assert all(map(torch.equal, rank["resumed"]["moments"], rank["whole"]["moments"]))
        assert rank["complete"] == "checkpoint-8"
    assert first["sealed"] == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 6, 8)]
    assert second["sealed"] == []
    assert {"rng_state_0.pth", "rng_state_1.pth", "compressm.complete"} <= set(first["files"])


@pytest.mark.parametrize(("name", "message"), [("hurt-raise", "OSError: a wound"), ("hurt-drift", "differ between")])
def test_what_fails_in_one_process_fails_in_all_and_changes_nothing(name: str, message: str, found: dict) -> None:
    for rank in found[name]:
        assert message in rank["error"]
        assert rank["whole"]


@pytest.mark.slow
def test_a_process_killed_in_a_cut_takes_the_other_down(tmp_path: Path) -> None:
    start = time.monotonic()
    process = launch(tmp_path, "hurt-kill")
    assert process.returncode != 0
    assert "SIGKILL" in process.stderr
    assert time.monotonic() - start < 120  # torch's own timeout is 30 minutes
    assert not (tmp_path / "hurt-kill" / "rank1.pt").exists()
    survivor = tmp_path / "hurt-kill" / "rank0.pt"
    assert not survivor.exists() or "error" in torch.load(survivor)  # where it was told before it was ended
