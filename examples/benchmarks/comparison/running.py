"""The command line of the comparison: read settings, run the rows that are not done, write tables and pictures.

Every finished row is written at once, and a second call passes over it; a row that was interrupted goes on from its
last complete checkpoint. Each row has a process of its own, so that its peak of memory is its own; under `--smoke` all
share one.
"""

import argparse
import functools
import gc
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from arms import ARMS
from drawing import draw
from rows import Results, Row, Study, check_same, chosen, read_study
from runs import Run
from slots import Job, in_slots
from tables import write_tables


FOLDER = Path(__file__).resolve().parent


def run_row(study: Study, row: Row, output: Path) -> dict[str, Any]:
    """Run one row and write its line.

    Args:
        study: whose row it is.
        row: to run.
        output: folder of the results.

    Raises:
        ValueError: for an unknown arm or options that it does not take, or where another row has to come first.
    """
    if row.arm not in ARMS:
        raise ValueError(f"{row.key}: the arm must be one of {sorted(ARMS)}, got {row.arm!r}.")
    arm, run = ARMS[row.arm], Run(study, row, output)
    unknown = sorted(set(row.options) - set(arm.__code__.co_varnames[1 : arm.__code__.co_argcount]))
    if unknown:
        raise ValueError(f"{row.key}: the arm {row.arm!r} does not take {', '.join(unknown)}.")
    values = arm(run, **row.options)
    Results(output).add(values)
    run.tidy()
    return values


def run_rows(
    studies: Sequence[Study], output: Path, only: Sequence[str] | None = None, processes: int = 0
) -> list[str]:
    """Run those rows that are not done yet.

    Args:
        studies: with their rows.
        output: folder of the results.
        only: patterns of names or keys.
        processes: at once; with 0 the rows run one after the other in this process.

    Returns:
        Keys of the rows that failed in their processes.

    Raises:
        ValueError: if a row was run with other settings, or rows wait for one another.
    """
    done, failed = Results(output).read(), []
    jobs = [(study, row) for study in studies for row in chosen(study.rows, only)]
    for study, row in jobs:
        check_same(study, row, done.get(row.key))
    for _, row in [job for job in jobs if job[1].key in done]:
        print(f"{row.key}: done before", flush=True)
    jobs = [job for job in jobs if job[1].key not in done]
    if not processes:
        for study, row in jobs:
            _tell_start((study, row))
            _tell_end(run_row(study, row, output))
        return []
    for (_, row), future in in_slots(jobs, functools.partial(_run_job, output=output), processes, _tell_start):
        error = future.exception()
        if error is None:
            _tell_end(future.result())
        else:
            failed.append(row.key)
            print(f"{row.key}: failed. {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return failed


def main(description: str, settings: Sequence[str], arguments: Sequence[str] | None = None) -> None:
    """Run a script of the comparison.

    Args:
        description: of the script.
        settings: names of the files in `settings/` that it runs by default.
        arguments: of the command line; by default those of this process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", type=Path, default=[FOLDER / "settings" / name for name in settings])
    parser.add_argument("--output", type=Path, help="folder of results and runs; a run that was interrupted goes on")
    parser.add_argument("--only", nargs="+", help="names or keys of rows, with * and ?")
    parser.add_argument(
        "--processes", type=_at_least_one, default=1, help="rows that run at once, on one device (default: 1)"
    )
    parser.add_argument("--mnist_dir", help="folder with MNIST's idx files")
    parser.add_argument("--train_file", nargs="+", help="local text, instead of Python's standard library")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that all of it runs")
    options = parser.parse_args(arguments)
    overrides = {name: getattr(options, name) for name in ("mnist_dir", "train_file") if getattr(options, name)}
    try:
        studies = [read_study(path, options.smoke, {} if options.smoke else overrides) for path in options.settings]
        with tempfile.TemporaryDirectory() as temporary:
            output = options.output or Path(temporary if options.smoke else "runs/comparison")
            failed = run_rows(studies, output, options.only, 0 if options.smoke else options.processes)
            results = Results(output).of(studies)
            print(write_tables(results, output))
            draw(results, output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if failed:
        print(f"error: these rows failed, and the same command tries them again: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _at_least_one(text: str) -> int:
    """A number of processes."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def _run_job(job: Job, output: Path) -> dict[str, Any]:
    """What `run_row` returns, with a peak of GPU memory of its own."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    return run_row(*job, output)


def _tell_start(job: Job) -> None:
    """Say that a row begins."""
    print(f"{job[1].key}: running", flush=True)


def _tell_end(values: Mapping[str, Any]) -> None:
    """Say what came out of a row."""
    figure, seconds = values["test"][values["metric"]], values["costs"]["total_seconds"]
    end = f"{values['metric']} {figure:.4f}, states {values['sizes']}, {seconds:.0f} s"
    print(f"{values['key']}: {end}", flush=True)
