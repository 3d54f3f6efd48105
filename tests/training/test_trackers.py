"""The numbers of a cut where people look at them: TensorBoard's event files and Trackio's local store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compressm.compression.log import PACE
from tests.family_table import LRU, STATE_SIZE
from tests.trainers import Examples, trainer_of


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
NAMES = {
    "compressm/cut",
    "compressm/state_size_mean",
    "compressm/parameters",
    "compressm/state_bytes",
    "compressm/energy_kept",
    "compressm/predicted_error",
    "compressm/seconds",
    "compressm/layer_00/state_size",
    "compressm/layer_01/effective_states",
    PACE,
}

TRACKED = """
import json, sys
from pathlib import Path
import trackio
from tests.family_table import LRU
from tests.trainers import Examples, trainer_of
trainer_of(
    LRU, Path(sys.argv[1]), report_to=["trackio"], run_name="cut", eval_dataset=Examples(LRU, 2),
    eval_strategy="steps", eval_steps=2, max_steps=6,
).train()
from trackio.sqlite_storage import SQLiteStorage
(project,) = SQLiteStorage.get_projects()
(run,) = SQLiteStorage.get_runs(project)
print(json.dumps(SQLiteStorage.get_logs(project, run)))
"""


def test_tensorboard_has_the_cut_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer_of(LRU, tmp_path, report_to=["tensorboard"], eval_dataset=Examples(LRU, 2), **EVALUATING).train()
    (file,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    board = events.EventAccumulator(str(file))
    board.Reload()
    found = {name.removeprefix("train/"): board.Scalars(name) for name in board.Tags()["scalars"]}
    assert found.keys() >= NAMES
    (size,) = found["compressm/layer_00/state_size"]
    assert (size.step, size.value) == (2, STATE_SIZE / 2)
    assert {point.step for point in found[PACE]} > {2}


@pytest.mark.slow
def test_trackio_has_the_cut_in_its_store(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", TRACKED, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = json.loads(done.stdout.splitlines()[-1])
    assert {name.removeprefix("train/") for entry in logs for name in entry} >= NAMES
