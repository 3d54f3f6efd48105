"""Rows of a benchmark of single cuts: each is run once, written once it is done, and passed over by the next call."""

import argparse
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cut_arms import Arm, lacking
from measuring import machine
from rows import Results, chosen
from small_training import OPTIMIZER_FILE, Task, Training
from transformers.utils import logging

from hf_compressm import enable_fast_selective_scan


@dataclass(frozen=True)
class Row:
    """A line of the results.

    Attributes:
        key: names it.
        name: of its arm, and what else it does.
        run: returns its figures.
        arm: the way to cut that it needs, or None.
    """

    key: str
    name: str
    run: Callable[[], dict[str, Any]]
    arm: Arm | None = None


@dataclass(frozen=True)
class Bench(ABC):
    """One task with one seed.

    Attributes:
        task: data.
        seed: of the model's start and of the data.
        models: folder of trained models.
        steps: of the whole training.
    """

    task: Task
    seed: int
    models: Path
    steps: int

    @property
    def marks(self) -> Sequence[int]:
        """Steps after which the model is saved, ascending; the last one ends the training."""
        return (self.steps,)

    @abstractmethod
    def begin(self) -> Training:
        """A new model at its full size."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """All rows."""

    def trained(self, step: int) -> Training:
        """The uncut model after some of its training: loaded, or trained on from what there is and saved."""
        folders = {mark: self.models / f"{self.task.name}_{self.seed}" / f"step-{mark}" for mark in self.marks}
        done = [mark for mark in self.marks if mark <= step and (folders[mark] / OPTIMIZER_FILE).exists()]
        training = Training.load(self.task, self.seed, folders[done[-1]]) if done else self.begin()
        for mark in [mark for mark in self.marks if training.step < mark <= step]:
            training.until(mark)
            training.save(folders[mark])
        return training


def run_rows(
    benches: Iterable[Bench],
    patterns: Sequence[str] | None,
    results: Results,
) -> list[Mapping[str, Any]]:
    """Run the rows that are not done, and return what all that are done gave.

    Args:
        benches: whose rows they are.
        patterns: of names or keys, with * and ?; None for all rows.
        results: where they are written.
    """
    for bench in benches:
        model = bench.begin().model
        told = set()
        for row in chosen(list(bench.rows()), patterns):
            reason = lacking(row.arm, model) if row.arm else ""
            if reason and row.arm not in told:
                print(f"{row.key}: left out, {reason}", flush=True)
            told |= {row.arm} if reason else set()
            if reason or row.key in results.read():
                continue
            start = time.perf_counter()
            values = {"key": row.key, "task": bench.task.name, "seed": bench.seed, "steps": bench.steps, **row.run()}
            results.add(values | {"seconds": time.perf_counter() - start, "machine": machine()})
            print(f"{row.key}: {values}", flush=True)
    return list(results.read().values())


def command(
    text: str | None,
    tasks: Sequence[str],
    run: Callable[[argparse.Namespace, Path], None],
    folder: str,
    arguments: list[str] | None = None,
) -> None:
    """Read a benchmark's command line, and run it.

    Args:
        text: what it does.
        tasks: that can be chosen, all by default.
        run: does it, with the options and the folder of the results.
        folder: of the results, unless the options name one.
        arguments: instead of those of the process.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names or keys of rows, with * and ?")
    parser.add_argument("--train_file", help="text file; Python's standard library without it")
    parser.add_argument("--output", type=Path, help="folder of results.jsonl; a run that was interrupted goes on")
    parser.add_argument("--models", type=Path, help="folder of the trained models; by default in that of the results")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that all of it runs")
    args = parser.parse_args(arguments)
    enable_fast_selective_scan()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        run(args, args.output or Path(temporary if args.smoke else folder))
