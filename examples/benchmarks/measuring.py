"""What the benchmarks share: best of several, a process of their own, peak memory, a table with ratio and spread."""

import gc
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers


try:
    import resource
except ImportError:  # Windows: no peak memory there
    resource = None


@dataclass
class Row:
    """A line of the table: our figure against each peer's, one pair per round."""

    goal: str
    work: str
    ours: list[float]
    peers: dict[str, list[float]]
    wanted: dict[str, float]
    unit: str = "s"
    note: str = ""

    def ratios(self, peer: str) -> list[float]:
        """Peer over ours, for each round; the slowest peers are run once."""
        peers = self.peers[peer]
        return [peers[min(i, len(peers) - 1)] / ours for i, ours in enumerate(self.ours)]

    def lines(self) -> list[str]:
        """The rows of a Markdown table, one for each peer."""
        lines = []
        for peer, figures in self.peers.items():
            ratios, wanted = self.ratios(peer), self.wanted.get(peer)
            best = min(figures) / min(self.ours)
            met = "" if wanted is None else ("yes" if best >= wanted else "**no**")
            goal = "" if wanted is None else f"{wanted:g}"
            spread = f"{min(ratios):.3g} to {max(ratios):.3g}"
            cells = (self.goal, self.work, peer, show(min(figures), self.unit), show(min(self.ours), self.unit))
            lines.append(f"| {' | '.join(cells)} | {best:.3g} | {spread} | {goal} | {met} |")
        return [*lines, *([f"{self.goal}: {self.note}"] if self.note else [])]


HEADER = (
    "| goal | work | peer | peer's | ours | ratio of the best | ratio per round | goal | met |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def show(figure: float, unit: str) -> str:
    """A figure with three digits and its unit."""
    return f"{figure:.3g} {unit}"


def best_seconds(work: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
    """The shortest of several runs, in seconds."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, run in a fresh process: no patch, compiled code or memory of another peer is left in it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def in_python(python: str, script: Path, *arguments: Any) -> Any:
    """The JSON that a script prints as its last line, run by another interpreter."""
    command = [python, str(script), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory() -> float:
    """The most memory that this process has held, in MiB; NaN where the system does not tell."""
    if resource is None:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def memory() -> float:
    """The memory that this process holds now, in MiB."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def machine() -> str:
    """Processor, threads and versions, for the record."""
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads; {versions}"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"
