"""The command line of the comparison: read settings, run the rows that are not done, write tables and pictures.

Every finished row is written at once, and a second call passes over it; a row that was interrupted goes on from its
last complete checkpoint. Each row has a process of its own, so that its peak of memory is its own; under `--smoke` all
share one.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arms import ARMS
from drawing import draw
from rows import Results, Row, Study, chosen, read_study
from runs import Run
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
    return values


def run_rows(study: Study, output: Path, only: Sequence[str] | None = None, own_process: bool = True) -> None:
    """Run those rows of a study that are not done yet, one after the other.

    Args:
        study: with its rows.
        output: folder of the results.
        only: patterns of names or keys.
        own_process: whether each row runs in a process of its own.
    """
    for row in chosen(study.rows, only):
        if row.key in Results(output).read():
            print(f"{row.key}: done before", flush=True)
            continue
        print(f"{row.key}: running", flush=True)
        values = _in_own_process(study, row, output) if own_process else run_row(study, row, output)
        figure, seconds = values["test"][values["metric"]], values["costs"]["total_seconds"]
        print(f"{row.key}: {values['metric']} {figure:.4f}, states {values['sizes']}, {seconds:.0f} s", flush=True)


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
    parser.add_argument("--mnist_dir", help="folder with MNIST's idx files")
    parser.add_argument("--train_file", nargs="+", help="local text, instead of Python's standard library")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that all of it runs")
    options = parser.parse_args(arguments)
    overrides = {name: getattr(options, name) for name in ("mnist_dir", "train_file") if getattr(options, name)}
    try:
        studies = [read_study(path, options.smoke, {} if options.smoke else overrides) for path in options.settings]
        with tempfile.TemporaryDirectory() as temporary:
            output = options.output or Path(temporary if options.smoke else "runs/comparison")
            for study in studies:
                run_rows(study, output, options.only, own_process=not options.smoke)
            results = list(Results(output).read().values())
            print(write_tables(results, output))
            draw(results, output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _in_own_process(study: Study, row: Row, output: Path) -> dict[str, Any]:
    """What `run_row` returns, from a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_row, (study, row, output))
