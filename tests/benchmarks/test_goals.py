"""The benchmarks of speed run at toy sizes, and their table says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, FOLDER / script, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_goals_are_measured_and_drawn(tmp_path: Path) -> None:
    goals = ["P4", "P6", "P7", "P9"]
    run("goals.py", "--smoke", "--rounds", "1", "--output", str(tmp_path), "--goals", "P7")
    rest = ["P4", "P6", "P9"]  # one by one or together: there is one table
    table = run("goals.py", "--smoke", "--rounds", "2", "--output", str(tmp_path), "--goals", *rest)
    record = json.loads((tmp_path / "goals.json").read_text())
    assert {row["goal"] for row in record["rows"]} == set(goals)
    for row in record["rows"]:
        assert all(figure > 0 for figures in (row["ours"], *row["peers"].values()) for figure in figures)
        assert f"| {row['goal']} | {row['work']} |" in table
    assert (tmp_path / "goals.png").stat().st_size > 10_000
    # The state of a decoded token is what a cut from 128 to 12 leaves of it.
    (bytes_of_state,) = [row for row in record["rows"] if row["work"] == "bytes of state"]
    assert bytes_of_state["peers"]["before"][0] / bytes_of_state["ours"][0] == pytest.approx(128 / 12)


@pytest.mark.slow
def test_scaling_is_measured_and_drawn(tmp_path: Path) -> None:
    run("scaling.py", "--smoke", "--repeats", "1", "--output", str(tmp_path))
    curves = json.loads((tmp_path / "scaling.json").read_text())["curves"]
    assert list(curves) == ["length", "states", "batch", "channels"]
    assert all(seconds > 0 for scans in curves.values() for points in scans.values() for _, seconds in points)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_scan_of_mamba2_is_measured() -> None:
    table = run("mamba2_scan.py", "--smoke", "--rounds", "1", "--state_sizes", "4")
    assert "| scan of a Mamba-2 layer, N=4 | stock |" in table


@pytest.mark.slow
def test_the_step_of_a_delta_rule_is_measured() -> None:
    table = run("delta_rule.py", "--smoke", "--rounds", "1", "--key_sizes", "8")
    assert "| step of a gated delta net, key size 8 | stock |" in table
    assert "| step of a Kimi delta attention, key size 8 | stock |" in table
    assert table.count("peak memory: ") == 2
