"""The gallery's tasks run, in a few steps, and print what was cut and won."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


GALLERY = Path(__file__).resolve().parents[2] / "examples" / "gallery"
SHORT = {
    "bidirectional_bytes.py": ["--steps", "20"],
    "four_way_digits.py": ["--epochs", "3"],
    "plain_loop_series.py": ["--steps", "16"],
}


def test_every_task_is_tried() -> None:
    assert {path.name for path in GALLERY.glob("*.py")} == SHORT.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_task_cuts_and_says_what_it_won(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(GALLERY / name), *SHORT[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [list(map(int, re.findall(r": (\d+)", part))) for part in re.findall(r"\{.*?\}", done.stdout)]
    assert max(sizes[-1]) < min(sizes[-2])
    assert re.search(r"\d\.\d\d times as fast", done.stdout)
