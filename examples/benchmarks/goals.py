"""Every speed goal in one table: ours against the named peer in the same run, with ratio and spread.

P1 and P2 need mambapy for that peer, P3 and P4 s5-pytorch, P3 to P5 a clone of github.com/camail-official/compressm
and a Python with jax, equinox and optax, this one or another; without mambapy or the clone those peers are left out,
and P5 with them. P8 comes with P1, which runs the stock loop once, in minutes: its ratio per round is then the spread
of ours. P10, compiled models, comes with P1 and P2. `--smoke` takes toy sizes where there are such, and leaves slow
peers out, to see that all of it runs.

    python examples/benchmarks/goals.py
    python examples/benchmarks/goals.py --goals P3 P4 P5 --reference ~/compressm --reference_python ~/jax/bin/python
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import goals_lru
import goals_mamba
import goals_runs
from measuring import HEADER, Row, machine
from plots import draw_goals


GOALS = [f"P{number}" for number in range(1, 10)]  # P8 and P10 come with P1


def rows_of(goal: str, options: argparse.Namespace, directory: str) -> list[Row]:
    """Measure one goal."""
    peers = ["mambapy"] if importlib.util.find_spec("mambapy") else []
    slow = [] if options.smoke else ["compile", "stock"]
    size = {"batch": 2, "length": 16} if options.smoke else {}
    rounds, repeats = options.rounds, 1 if options.smoke else 5
    reference = (options.reference, options.reference_python)
    works: dict[str, Callable[[], list[Row]]] = {
        "P1": lambda: goals_mamba.steps(128, [*peers, *slow], rounds, **size),
        "P2": lambda: goals_mamba.steps(16, [*peers, *slow], rounds, **size),
        "P3": lambda: goals_lru.steps("P3", rounds, repeats, *reference),
        "P4": lambda: goals_lru.steps("P4", rounds, repeats, *reference),
        "P5": lambda: goals_lru.cut(rounds, repeats, *reference) if options.reference else [],
        "P6": lambda: [
            *goals_runs.run("lru", rounds, directory, 40 if options.smoke else None),
            *goals_runs.run("mamba", rounds, directory, 40 if options.smoke else None),
        ],
        "P7": lambda: goals_runs.large_cut(rounds, *([(2, 64, 64, 256)] if options.smoke else [])),
        "P9": lambda: goals_mamba.decoding(rounds, *((3, 2) if options.smoke else ())),
    }
    return works[goal]() if goal in works else []


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=GOALS)
    parser.add_argument("--rounds", type=int, default=3, help="how often each pair is measured, for the spread")
    parser.add_argument("--reference", type=Path, help="clone of the reference implementation")
    parser.add_argument("--reference_python", default=sys.executable, help="a Python with jax, equinox and optax")
    parser.add_argument("--output", type=Path, help="folder for goals.json, which keeps other goals, and goals.png")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, without the slow peers")
    return parser.parse_args()


def main() -> None:
    """Measure, print and draw."""
    options = parse_arguments()
    print(machine(), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for goal in options.goals:
            found = rows_of(goal, options, directory)
            rows += found
            for row in found:
                print("\n".join(row.lines()), flush=True)
    if options.output is not None:
        rows = record(rows, options.output)
    print(f"\n{HEADER}")
    lines = [line for row in rows for line in row.lines()]
    print("\n".join(sorted(lines, key=lambda line: not line.startswith("|"))))


def record(rows: list[Row], folder: Path) -> list[Row]:
    """Write the rows and draw them, with other rows that an earlier run on this machine left there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "goals.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before.get("machine") == machine():
        new = {row.work for row in rows}
        rows = sorted([*rows, *(Row(**row) for row in before["rows"] if row["work"] not in new)], key=lambda r: r.goal)
    path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2), "utf-8")
    draw_goals(rows, folder / "goals.png")
    return rows


if __name__ == "__main__":
    main()
