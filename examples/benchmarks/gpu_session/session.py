"""A session: figures in their order, each within what is left of the time, written down as soon as it is there."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_session.scale import Scale
from gpu_session.tables import cells
from gpu_session.workers import Worker
from rows import Results


PATIENCE = 3
"""A figure may take so many times what it is said to need."""


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        section: what is measured.
        way: in which way.
        size: N.
        measure: called with way, size and scale in the worker's process; a function of a module, or a partial of one.
        needs: seconds on a GPU, start of the process aside.
        worker: the way that its process is left with.
    """

    section: str
    way: str
    size: int
    measure: Callable[..., dict[str, Any]]
    needs: float
    worker: str

    @property
    def name(self) -> str:
        """What it is picked by."""
        return f"{self.section}, {self.way}, N={self.size}"


class Session:
    """Measures what is not in the results yet.

    Args:
        results: that figures are read from and added to.
        machine: card, driver and versions.
        scale: shapes.
        budget: seconds for all of it.
    """

    def __init__(self, results: Results, machine: Mapping[str, str], scale: Scale, budget: float) -> None:
        self.results, self.machine, self.scale = results, machine, scale
        self.end = time.monotonic() + budget
        self._workers: dict[str, Worker] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.end - time.monotonic())

    def key(self, name: str) -> str:
        """Of a figure of this scale on this machine."""
        return " | ".join([name, self.scale.name, *(f"{kind} {text}" for kind, text in self.machine.items())])

    def found(self) -> dict[str, dict[str, Any]]:
        """What this session's results have, by a figure's name."""
        ours = self.key("")
        return {row["name"]: row for key, row in self.results.read().items() if key == row.get("name", "") + ours}

    def missing(self, figures: Sequence[Figure]) -> list[Figure]:
        """Those not measured yet; what failed is tried again."""
        done = {name for name, row in self.found().items() if "failed" not in row}
        return [figure for figure in figures if figure.name not in done]

    def run(self, figures: Sequence[Figure]) -> None:
        """Measure what is missing, and pass over what no longer fits."""
        for figure in self.missing(figures):
            if self.left < figure.needs:
                print(f"{figure.name}: skipped, needs {figure.needs:.0f} s of the {self.left:.0f} left", flush=True)
                continue
            self.take(figure.name, lambda figure=figure: self._measure(figure))

    def take(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure, or note what failed; write it down and tell it."""
        start = time.monotonic()
        try:
            values = measure()
        except Exception as error:
            values = {"failed": f"{type(error).__name__}: {error}"}
        took = round(time.monotonic() - start, 2)
        row = {"key": self.key(name), "name": name, "took": took, **values, "machine": dict(self.machine)}
        self.results.add(row)
        print(f"{name}: {', '.join(cell for cell in cells(row) if cell != '-')} ({took:.1f} s)", flush=True)

    def start(self, ways: Sequence[str]) -> None:
        """Start processes ahead of their figures."""
        for way in ways:
            if way not in self._workers or not self._workers[way].is_alive:
                self._workers[way] = Worker(way)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers.values():
            worker.end(patience=5)
        self._workers.clear()

    def _measure(self, figure: Figure) -> dict[str, Any]:
        """One figure, in its process."""
        self.start([figure.worker])
        worker = self._workers[figure.worker]
        worker.wait(self.left)
        limit = min(self.left, PATIENCE * figure.needs)
        return worker.ask(figure.measure, figure.way, figure.size, self.scale, limit=limit)
