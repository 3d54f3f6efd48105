"""Runs that are killed, terminated or run out of disk go on from what is whole, and end bit for bit the same."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import same


ROOT = Path(__file__).resolve().parents[1]
OUTCOME = "outcome.pt"
PAUSE = 0.02  # seconds in each phase, so that a kill lands there
RUN_SECONDS = 5.0  # a run takes about so long, with its pauses
KILLS = 24  # of each of the two families
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
        self.errors = folder / "stderr.txt"
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
        life, deadline, pid, seen = Life(), None, 0, 0
        while True:
            line = self.line(deadline)
            if line is None:
                os.kill(pid, signal.SIGKILL)
                life.killed, deadline = True, None
            elif line.startswith("ended "):
                life.code = int(line[6:])
                assert life.code == (-signal.SIGKILL if life.killed else 0), self.errors.read_text()[-4000:]
                return life
            elif line.startswith("pid "):
                pid = int(line[4:])
            else:
                life.phases.append(line)
                seen += aim is not None and line.startswith(aim.phase)
                if aim is not None and seen == aim.count and deadline is None and not life.killed:
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


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts of two outcomes that are not equal bit for bit."""
    return [part for part in one if not same(one[part], other[part])]


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
    processes.run(tmp_path / "whole", family=family, scenario="cuts")
    whole = ending(tmp_path / "whole")
    assert [event[:2] for event in whole["events"]] == [(3, "cut"), (6, "cut"), (9, "cut")]
    landings = kill_until(KILLS, processes, tmp_path, whole, family)
    print(f"\n{family}:", *(f"{count:4d}  {phase}" for phase, count in sorted(landings.items())), sep="\n")
    for place in ("save:", "cut:"):
        assert sum(count for phase, count in landings.items() if phase.startswith(place)) >= 5


QUICK = {"family": "lru", "scenario": "cuts", "pause": 0}


def kill_in(phase: str, count: int, processes: Processes, folder: Path, **job: Any) -> None:
    """Kill a run right inside a phase, the `count`-th time that it is there."""
    life = processes.run(folder, Aim(phase, count), linger=phase, **job)
    assert life.killed, phase
    assert life.phases[-1] == phase


def test_a_run_that_is_killed_inside_a_cut_and_a_save_ends_as_if_it_never_was(
    processes: Processes, tmp_path: Path
) -> None:
    processes.run(tmp_path / "whole", **QUICK)
    kill_in("cut: optimizer in, config old", 1, processes, tmp_path / "killed", **QUICK)
    kill_in("save: half of model.safetensors", 1, processes, tmp_path / "killed", **QUICK)  # the first after the cut
    kill_in("cut: parameters in, optimizer old", 2, processes, tmp_path / "killed", **QUICK)
    kill_in("save: weights without optimizer", 1, processes, tmp_path / "killed", **QUICK)
    processes.run(tmp_path / "killed", **QUICK)
    assert different(ending(tmp_path / "whole"), ending(tmp_path / "killed")) == []
