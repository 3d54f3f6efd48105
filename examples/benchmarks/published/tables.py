"""The rows of `published_table.py` as Markdown, beside the figures that others have published."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


Row = Mapping[str, Any]
TABLE_FILE = "tables.md"
UNCUT = "uncut"
SOURCE = "arXiv 2602.11408"
SIZES = ("130m", "370m", "780m", "1.3b", "2.7b")
PUBLISHED: dict[str, dict[float, Sequence[float | None]]] = {
    UNCUT: {0.0: (25.85, 18.13, 14.97, 13.17, 11.46)},
    "GHOST": {
        0.1: (None, None, None, 13.24, None),
        0.3: (None, None, None, 13.51, None),
        0.5: (29.06, 19.96, 16.13, 14.23, 12.14),
        0.7: (None, None, None, 16.16, None),
        0.9: (None, None, None, 25.07, None),
    },
    "second-order Taylor": {
        0.1: (None, None, None, 13.18, None),
        0.3: (None, None, None, 13.26, None),
        0.5: (1016, 12647, 15.13, 13.94, 11.50),
        0.7: (None, None, None, 4255, None),
        0.9: (None, None, None, 4690, None),
    },
    "magnitude": {0.5: (910, 120, 30.6, 29.3, 20.0)},
    "random": {
        0.1: (None, None, None, 13.52, None),
        0.3: (None, None, None, 15.04, None),
        0.5: (45.6, 23.7, 5197, 17.8, 15.9),
        0.7: (None, None, None, 30.14, None),
        0.9: (None, None, None, 64.21, None),
    },
}
"""Perplexity on WikiText-2 of Mamba-2 right after a cut, by method and share of the states removed, for every size."""


def published(method: str, model: str, share: float) -> float | None:
    """What others have published for a model, which is known by the end of its name, `mamba2-130m` or the like."""
    found = re.search(r"mamba2-(\d+(?:\.\d+)?[mb])(?![\w.])", model)
    figures = PUBLISHED[method].get(share)
    if found is None or found[1] not in SIZES or figures is None:
        return None
    return figures[SIZES.index(found[1])]


def write_tables(rows: Sequence[Row], folder: Path) -> str:
    """Write all tables into `tables.md` of a folder, and return them."""
    content = "\n\n".join(tables(rows)) + "\n"
    (folder / TABLE_FILE).write_text(content, encoding="utf-8")
    return content


def tables(rows: Sequence[Row]) -> list[str]:
    """Perplexity for every share, tasks, costs, and the machines that all ran on."""
    if not rows:
        return ["No row is done."]
    found = [_perplexities(rows, share) for share in _distinct(row["share"] for row in rows if row["share"])]
    found += [_tasks(rows), _costs(rows)]
    machines = _distinct(f"- {row['machine']}; {row['device']}" for row in rows)
    return [table for table in (*found, "Ran on:\n\n" + "\n".join(machines)) if table]


def _perplexities(rows: Sequence[Row], share: float) -> str:
    """One line for each way, ours and published; one column for each model."""
    models = _distinct(row["model"] for row in rows)
    data = ", ".join(_distinct(row["settings"]["data"] for row in rows))
    lines = [
        f"### Perplexity on {data}, {share:.0%} of the states removed",
        "Right after the cut, then after each number of steps of recovery.",
        _line("way", *models) + "\n" + _rule(len(models) + 1),
    ]
    arms = [UNCUT, *_distinct(row["arm"] for row in rows if row["arm"] != UNCUT)]
    for arm in arms:
        of_arm = [row for row in rows if row["arm"] == arm and row["share"] == (0.0 if arm == UNCUT else share)]
        cells = [[row for row in of_arm if row["model"] == model] for model in models]
        if of_arm:
            lines.append(_line(arm, *(_course(cell) for cell in cells)))
    for method in PUBLISHED:
        figures = [published(method, model, 0.0 if method == UNCUT else share) for model in models]
        if any(figure is not None for figure in figures):
            shown = ("" if figure is None else f"{figure:g}" for figure in figures)
            lines.append(_line(f"{method}, published for WikiText-2 ({SOURCE})", *shown))
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _course(rows: Sequence[Row]) -> str:
    """Perplexity at every stage of one cut."""
    stages = sorted(rows, key=lambda row: row["step"])
    return ", ".join(f"{row['perplexity']:.2f}" + (f" ({row['step']})" if row["step"] else "") for row in stages)


def _tasks(rows: Sequence[Row]) -> str:
    """One line for each row, one column for each metric of each task; empty without tasks."""
    metrics = _distinct((task, metric) for row in rows for task, values in row["tasks"].items() for metric in values)
    if not metrics:
        return ""
    lines = [_line("model", "way", "removed", "steps", *(f"{task} {metric}" for task, metric in metrics))]
    lines.append(_rule(len(metrics) + 4))
    for row in rows:
        figures = [row["tasks"].get(task, {}).get(metric) for task, metric in metrics]
        shown = ("" if figure is None else f"{figure:.4g}" for figure in figures)
        lines.append(_line(row["model"], row["arm"], f"{row['share']:.0%}", str(row["step"]), *shown))
    return "### Tasks\n\n" + "\n".join(lines)


def _costs(rows: Sequence[Row]) -> str:
    """Seconds and memory of every cut; empty without one."""
    cuts = [row for row in rows if "cut" in row]
    if not cuts:
        return ""
    lines = [_line("model", "way", "removed", "states", "s of the cut", "peak MiB", "bytes of state"), _rule(7)]
    for row in cuts:
        cut = row["cut"]
        sizes, held = (f"{cut[name][0]:,} to {cut[name][1]:,}" for name in ("states", "state_bytes"))
        cells = (f"{row['share']:.0%}", sizes, f"{cut['seconds']:.1f}", f"{cut['peak_mib']:,.0f}", held)
        lines.append(_line(row["model"], row["arm"], *cells))
    return "### Costs of the cuts, calibration included\n\n" + "\n".join(lines)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"
