"""The scripts of the comparison: done rows are passed over, interrupted ones go on, and figures become tables."""

import importlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig
from hf_compressm.scans import disable_fast_selective_scan


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "comparison"
STEPS = 10
ROWS = """
task: {kind: images, validation: 64, limit: 32}
model: {type: lru, hidden_size: 4, state_size: 12, num_hidden_layers: 1, norm: batch}
training: {max_steps: 10, per_device_train_batch_size: 4, learning_rate: 1.0e-2, use_cpu: true}
rows:
  - {name: full, arm: scratch, seeds: [0], ranking: 5}
  - {name: cut, arm: cut, seeds: [0], cut: {target_state_size: 5, num_cuts: 1, end: 0.5}, refine: 5}
  - {name: small, arm: scratch, seeds: [0], size_of: cut}
  - {name: tuned, arm: prune, seeds: [0], after: full, size_of: cut, fine_tune: 0.5}
  - {name: distilled, arm: distil, seeds: [0], after: full, size_of: cut, temperature: 3.0}
  - {name: norm, arm: regularise, seeds: [0], size_of: cut, weight: 1.0e-3}
"""


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the comparison as its scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    disable_fast_selective_scan()


@pytest.fixture
def study(part: Any, tmp_path: Path) -> Any:
    path = tmp_path / "tiny.yaml"
    path.write_text(ROWS)
    return part("rows").read_study(path)


def results(part: Any, folder: Path) -> dict[str, dict[str, Any]]:
    return {values["name"]: values for values in part("rows").Results(folder).read().values()}


def test_every_arm_runs_and_says_what_it_cost(
    part: Any, study: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    running, output = part("running"), tmp_path / "output"
    running.run_rows([study], output)
    done = results(part, output)
    assert list(done) == ["full", "cut", "small", "tuned", "distilled", "norm"]
    assert {name: values["sizes"] for name, values in done.items()} == {n: [5] for n in done} | {"full": [12]}
    for values in done.values():
        costs = values["costs"]
        assert 0 <= values["test"]["accuracy"] <= 1
        assert costs["total_seconds"] >= costs["training_seconds"] > 0
        assert sum(phase["steps"] for phase in costs["phases"]) == (5 if values["name"] == "tuned" else STEPS)
        assert 0 < costs["share_of_speed_bound"] < 1
    assert [phase["sizes"] for phase in done["cut"]["costs"]["phases"]] == [[12], [5]]
    assert done["cut"]["cuts"][0]["step"] == done["cut"]["refinements"][0]["step"] == 5
    full = done["full"]["costs"]["total_seconds"]
    assert done["distilled"]["costs"]["inherited_seconds"] == done["tuned"]["costs"]["inherited_seconds"] == full
    assert done["full"]["ranking"][0]["points"][-1]["correlation"] == pytest.approx(1)
    assert not list(output.glob("runs/*/checkpoint-*"))

    monkeypatch.setattr(running, "ARMS", {})  # nothing may run again
    capsys.readouterr()
    running.run_rows([study], output)
    assert capsys.readouterr().out.count("done before") == len(done)

    table = part("tables").write_tables(list(done.values()), output)
    assert all(f"| {name} | 0 |" in table for name in done)
    assert all(path.stat().st_size > 5000 for path in part("drawing").draw(list(done.values()), output))


def test_an_interrupted_row_goes_on_from_its_checkpoint(
    part: Any, study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, clock = part("running"), part("clock")
    running.run_rows([study], tmp_path / "whole", ["cut"])
    step, steps = clock.TimedTrainer.training_step, []

    def fails_once(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 9:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(clock.TimedTrainer, "training_step", fails_once)
    with pytest.raises(KeyboardInterrupt):
        running.run_rows([study], tmp_path / "parts", ["cut"])
    assert not results(part, tmp_path / "parts")
    running.run_rows([study], tmp_path / "parts", ["cut"])
    assert steps == [*range(9), 8, 9]  # the checkpoint is of step 8
    whole, parts = (results(part, tmp_path / name)["cut"] for name in ("whole", "parts"))
    assert whole["test"] == parts["test"]
    assert parts["costs"]["interruptions"] == 1
    assert [p["steps"] for p in parts["costs"]["phases"]] == [p["steps"] for p in whole["costs"]["phases"]]
    assert [point[0] for point in parts["curve"]] == [point[0] for point in whole["curve"]]


def test_a_torn_line_does_not_count(part: Any, tmp_path: Path) -> None:
    kept = part("rows").Results(tmp_path)
    kept.add({"key": "a"})
    kept.path.write_text(kept.path.read_text() + '{"key": "b", "na')
    assert list(kept.read()) == ["a"]
    kept.add({"key": "c"})
    assert list(kept.read()) == ["a", "c"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: {", "work: {", "lacks the section"),
        ("seeds: [0], ranking: 5", "ranking: 5", "lacks seeds"),
        ("size_of: cut}", "size_of: nothing}", "needs the row 'nothing', which is not there"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(part: Any, tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(ROWS.replace(old, new))
    with pytest.raises(ValueError, match=message):
        part("rows").read_study(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arm: scratch", "arm: magic", "the arm must be one of"),
        ("ranking: 5", "size: 5", "does not take size"),
        ("kind: images", "kind: sounds", "must be one of"),
        ("validation: 64", "loudness: 64", "does not take these settings"),
    ],
)
def test_a_row_that_cannot_run_is_refused(part: Any, tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(ROWS.replace(old, new))
    with pytest.raises(ValueError, match=message):
        part("running").run_rows([part("rows").read_study(path)], tmp_path, ["full"])


def test_a_row_waits_for_the_one_that_it_needs(part: Any, study: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the result of tiny-cut-seed0"):
        part("running").run_rows([study], tmp_path, ["small"])


def test_rows_at_once_wait_for_those_that_they_need_and_outlive_a_failure(
    part: Any, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, begun, ended = part("slots"), [], []
    monkeypatch.setattr(slots, "_new_process", lambda count: ThreadPoolExecutor(1))

    def work(job: Any) -> str:
        time.sleep(0.02)
        if job[1].name == "cut":
            raise RuntimeError("no")
        return job[1].name

    def started(job: Any) -> None:
        assert {name for name in (job[1].size_of, job[1].after) if name} <= set(ended)
        begun.append(job[1].name)

    jobs = [(study, row) for row in reversed(study.rows)]
    for (_, row), future in slots.in_slots(jobs, work, 2, started):
        ended.append(row.name)
        assert (row.name == "cut") == (future.exception() is not None)
    assert sorted(begun) == sorted(ended) == sorted(row.name for row in study.rows)
    circle = [(study, replace(row, size_of="small")) for row in study.rows if row.name == "small"]
    with pytest.raises(ValueError, match="wait for one another: tiny-small-seed0"):
        list(slots.in_slots(circle, work, 2, print))


def test_a_row_that_was_run_with_other_settings_is_not_passed_over(part: Any, study: Any, tmp_path: Path) -> None:
    part("running").run_rows([study], tmp_path, ["full"])
    other = replace(study, training={**study.training, "max_steps": 12})
    with pytest.raises(ValueError, match=r"tiny-full-seed0 was run with other settings \(training\)"):
        part("running").run_rows([other], tmp_path, ["full"])


@pytest.mark.slow
def test_rows_run_in_processes_at_once(part: Any, study: Any, tmp_path: Path, capsys: Any) -> None:
    failed = part("running").run_rows([study], tmp_path, ["full", "cut", "small", "tuned"], processes=2)
    assert failed == []
    assert set(results(part, tmp_path)) == {"full", "cut", "small", "tuned"}
    (tmp_path / "runs" / "tiny-full-seed0" / "model" / "model.safetensors").unlink()
    failed = part("running").run_rows([study], tmp_path, ["distilled", "norm"], processes=2)
    assert failed == ["tiny-distilled-seed0"]
    assert "tiny-distilled-seed0: failed. OSError" in capsys.readouterr().err


def test_the_settings_that_are_shipped_can_be_read(part: Any) -> None:
    arms, rows = part("arms").ARMS, part("rows")
    for path in sorted((FOLDER / "settings").glob("*.yaml")):
        whole, smoke = rows.read_study(path), rows.read_study(path, smoke=True)
        assert len({row.key for row in whole.rows}) == len(whole.rows)
        assert {row.arm for row in whole.rows} <= set(arms)
        assert {row.group for row in whole.rows} <= set(part("drawing").STYLES)
        for row in whole.rows:
            code = arms[row.arm].__code__
            assert set(row.options) <= set(code.co_varnames[1 : code.co_argcount])
            CompreSSMConfig(**row.options.get("cut", {}))
        assert 0 < len(smoke.rows) < len(whole.rows)
        assert smoke.training["max_steps"] <= 20


@pytest.mark.slow
@pytest.mark.parametrize("script", ["smnist.py", "selective.py", "ranking.py"])
def test_the_scripts_run_small(script: str, tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / script, "--smoke", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines
    assert (tmp_path / "tables.md").read_text() in done.stdout
    studies = {line["study"] for line in lines}
    assert {path.stem.removesuffix("_size") for path in tmp_path.glob("*_size.png")} == studies
