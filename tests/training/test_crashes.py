"""Runs that are killed, terminated or run out of disk go on from what is whole, and end bit for bit the same."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compressm import find_last_complete_checkpoint
from tests.family_table import same


ROOT = Path(__file__).resolve().parents[2]
OUTCOME = "outcome.pt"
PAUSE = 0.02  # seconds in each phase, so that a kill lands there
RUN_SECONDS = 5.0  # a run takes about so long, with its pauses
KILLS = 24  # of each of the two families
FEWEST_LANDINGS = 3  # in a save, and in a cut; seals run beside the training, whose phases are told too
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@dataclass(frozen=True)
class Aim:
    """Kill `delay` seconds after the phase was entered for the `count`-th time."""

    phase: str
    count: int = 1
    delay: float = 0.0


@dataclass
class Life:
    """What became of one process."""

    phases: list[str] = field(default_factory=list)
    killed: bool = False
    code: int | None = None


class Processes:
    """Starts training processes by fork, from one that has done its imports, and kills them."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.folder, self.errors = folder, folder / "stderr.txt"
        self.wholes: dict[str, dict[str, Any]] = {}
        with self.errors.open("w") as errors:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "tests.crash_run"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        self.rest = b""
        assert self.line() == "ready", self.errors.read_text()

    def line(self, deadline: float | None = None) -> str | None:
        """The next line; None if the deadline passed."""
        while b"\n" not in self.rest:
            seconds = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self.server.stdout], [], [], seconds)[0]:
                return None
            chunk = os.read(self.server.stdout.fileno(), 1 << 16)
            assert chunk, self.errors.read_text()
            self.rest += chunk
        line, self.rest = self.rest.split(b"\n", 1)
        return line.decode()

    def run(self, folder: Path, aim: Aim | None = None, **job: Any) -> Life:
        """Train in a new process until it ends, or until it is killed where the aim says."""
        self.server.stdin.write(json.dumps({"folder": str(folder), "pause": PAUSE, **job}).encode() + b"\n")
        life, aimed, deadline, pid, seen = Life(), False, None, 0, 0
        while True:
            line = self.line(deadline)
            if line is None:
                with suppress(ProcessLookupError):  # it ended by itself a moment ago
                    os.kill(pid, signal.SIGKILL)
                aimed, deadline = True, None
            elif line.startswith("ended "):
                life.code = int(line[6:])
                life.killed = aimed and life.code == -signal.SIGKILL
                assert life.killed or life.code == 0, self.errors.read_text()[-4000:]
                return life
            elif line.startswith("pid "):
                pid = int(line[4:])
            else:
                life.phases.append(line)
                seen += aim is not None and line.startswith(aim.phase)
                if aim is not None and seen == aim.count and deadline is None and not aimed:
                    deadline = time.monotonic() + aim.delay


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"))
    yield found
    found.server.stdin.close()
    found.server.wait()
    found.server.stdout.close()


def ending(folder: Path) -> dict[str, Any]:
    return torch.load(folder / OUTCOME, weights_only=True)


def whole_run(processes: Processes, **job: Any) -> dict[str, Any]:
    """The outcome of a run that nothing interrupts; made once for all tests that ask for it."""
    key = json.dumps(job, sort_keys=True)
    if key not in processes.wholes:
        folder = processes.folder / f"whole-{len(processes.wholes)}"
        processes.run(folder, **job)
        processes.wholes[key] = {**ending(folder), "kept": [path.name for path in folder.glob("_before-cut-*")]}
    return processes.wholes[key]


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts of two outcomes that are not equal bit for bit."""
    return [part for part in other if not same(one[part], other[part])]


def random_aim(draw: random.Random, number: int) -> Aim:
    """Any moment; a moment while saving; a moment inside a cut; in turns."""
    if number % 3 == 0:
        return Aim("start", 1, draw.uniform(0, RUN_SECONDS))
    if number % 3 == 1:
        return Aim("save:", draw.randint(1, 40), draw.uniform(0, PAUSE))
    return Aim("cut:", draw.randint(1, 6), draw.uniform(0, PAUSE))


def kill_until(kills: int, processes: Processes, folder: Path, whole: dict[str, Any], family: str) -> Counter:
    """Kill runs at random moments and let them end where nothing was left to aim at; where the kills landed."""
    draw, landings, runs = random.Random(family), Counter(), 0
    while sum(landings.values()) < kills or not (folder / str(runs) / OUTCOME).exists():
        enough = sum(landings.values()) >= kills
        if (folder / str(runs) / OUTCOME).exists():
            runs += 1
        aim = None if enough else random_aim(draw, sum(landings.values()))
        life = processes.run(folder / str(runs), aim, family=family, scenario="cuts")
        if life.killed:
            landings[life.phases[-1]] += 1
        else:
            assert different(whole, ending(folder / str(runs))) == []
    landings["runs, each equal to the whole one"] = runs + 1
    return landings


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lru", "mamba"])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
    family: str, processes: Processes, tmp_path: Path
) -> None:
    whole = whole_run(processes, family=family, scenario="cuts", pause=0)
    assert [event[:2] for event in whole["events"]] == [(3, "cut"), (6, "cut"), (9, "cut")]
    landings = kill_until(KILLS, processes, tmp_path, whole, family)
    print(f"\n{family}:", *(f"{count:4d}  {phase}" for phase, count in sorted(landings.items())), sep="\n")
    for place in ("save:", "cut:"):
        assert sum(count for phase, count in landings.items() if phase.startswith(place)) >= FEWEST_LANDINGS


QUICK = {"family": "lru", "scenario": "cuts", "pause": 0}


def kill_in(phase: str, count: int, processes: Processes, folder: Path, **job: Any) -> None:
    """Kill a run right inside a phase, the `count`-th time that it is there."""
    life = processes.run(folder, Aim(phase, count), linger=phase, **job)
    assert life.killed, phase
    assert life.phases[-1] == phase


def test_a_run_that_is_killed_inside_a_cut_and_a_save_ends_as_if_it_never_was(
    processes: Processes, tmp_path: Path
) -> None:
    whole = whole_run(processes, **QUICK)
    kill_in("cut: optimizer in, config old", 1, processes, tmp_path / "killed", **QUICK)
    kill_in("save: half of model.safetensors", 1, processes, tmp_path / "killed", **QUICK)  # the first after the cut
    kill_in("cut: parameters in, optimizer old", 2, processes, tmp_path / "killed", **QUICK)
    kill_in("save: weights without optimizer", 1, processes, tmp_path / "killed", **QUICK)
    processes.run(tmp_path / "killed", **QUICK)
    assert different(whole, ending(tmp_path / "killed")) == []


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after a step, as if the grace period had ended before they were written."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


TERMS = {
    "before the cut, at the end of its step": ("cuts", "train: step 3 almost done", 1, 3),
    "before the cut, while its step is saved": ("cuts", "save: weights without optimizer", 3, 3),
    "inside the cut": ("cuts", "cut: parameters in, optimizer old", 1, 3),
    "after the cut": ("cuts", "train: step 4 begins", 1, 3),
    "inside a cut that is to be rolled back": ("recovery", "cut: optimizer in, config old", 1, 4),
    "at the step of the verdict": ("recovery", "train: step 7 almost done", 1, 7),
    "at a step that completes a stable ranking": ("stable", "train: step 4 almost done", 1, 4),
}
"""Scenario, phase and its count at which SIGTERM comes, and the step of the checkpoint that is then written."""


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 100], ids=["over another checkpoint", "alone"])
@pytest.mark.parametrize(("scenario", "term", "count", "step"), TERMS.values(), ids=TERMS)
def test_a_run_that_is_terminated_around_a_cut_goes_on_from_the_checkpoint_it_had_time_for(
    scenario: str, term: str, count: int, step: int, saves: int, processes: Processes, tmp_path: Path
) -> None:
    if saves == 100 and term.startswith("save:"):
        pytest.skip("nothing is saved there")
    job: dict[str, Any] = {"family": "lru", "scenario": scenario, "pause": 0}
    job["arguments"] = {"save_steps": saves, "enable_jit_checkpoint": True}
    whole = whole_run(processes, **job)
    processes.run(tmp_path / "terminated", term=term, count=count, **job)
    assert not (tmp_path / "terminated" / OUTCOME).exists()
    remove_after(tmp_path / "terminated", step)
    assert find_last_complete_checkpoint(tmp_path / "terminated") == str(
        tmp_path / "terminated" / f"checkpoint-{step}"
    )
    processes.run(tmp_path / "terminated", **job)
    log = {"log"}  # transformers writes the checkpoint before it has logged the step
    assert set(different(whole, ending(tmp_path / "terminated"))) <= log


WAITING = {
    "after the cut": [("train: step 5 begins", 1)],
    "in the save after the cut": [("save: half of optimizer.pt", 5)],
    "while the verdict is awaited": [("save: sealed", 6)],
    "after the verdict, before it is saved": [("evaluated: step 7", 1)],
    "after the verdict is saved, before the rollback": [("save: sealed", 7)],
    "inside the rollback": [("load: weights without optimizer", 1)],
    "after the rollback": [("roll back: done", 1)],
    "in the save after the rollback": [("save: before the rotation", 8)],
    "while the kept checkpoint is removed": [("remove: half of kept checkpoint", 1)],
    "everywhere": [
        ("keep: one more file", 3),
        ("cut: done", 1),
        ("evaluated: step 7", 1),
        ("roll back: begins", 1),
        ("load: weights without optimizer", 2),  # the first is that of the resume
        ("save: all without seal", 1),
        ("train: step 10 begins", 1),
        ("evaluated: step 11", 1),
    ],
}
"""Phases, and their counts in that process, in which a run with a rollback is killed one after the other."""


@pytest.mark.slow
@pytest.mark.parametrize("kills", WAITING.values(), ids=WAITING)
@pytest.mark.parametrize("family", ["lru", "mamba"])
def test_a_rollback_that_is_pending_survives_kills(
    family: str, kills: list[tuple[str, int]], processes: Processes, tmp_path: Path
) -> None:
    job: dict[str, Any] = {"family": family, "scenario": "recovery", "pause": 0, "arguments": {"save_total_limit": 3}}
    whole = whole_run(processes, **job)
    assert [event[:2] for event in whole["events"]][:3] == [(4, "cut"), (7, "rolled back"), (8, "cut")]
    for phase, count in kills:
        kill_in(phase, count, processes, tmp_path / "killed", **job)
    processes.run(tmp_path / "killed", **job)
    assert different(whole, ending(tmp_path / "killed")) == []
    kept = [path.name for path in (tmp_path / "killed").glob("_before-cut-*")]
    assert kept == whole["kept"]
