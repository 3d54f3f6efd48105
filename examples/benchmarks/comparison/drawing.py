"""Pictures of the comparison: figure against final size and against time, and how the order of the states settles."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from plots import GREY, save
from tables import Result, figure_of, grouped


STYLES = {
    "cut": ("#0072b2", "o", "cut while training"),
    "paper": ("#56b4e9", "P", "cut while training, as in the paper"),
    "scratch": ("#d55e00", "s", "small from scratch"),
    "prune": ("#009e73", "^", "pruned afterwards"),
    "distil": ("#cc79a7", "D", "distilled"),
    "regularise": ("#e69f00", "v", "Hankel nuclear norm"),
    "tune": ("#117733", "<", "pruned afterwards and fine-tuned"),
    "cut, own rate": ("#0072b2", "*", "cut while training, at the small size's rate"),
    "distil, own rate": ("#cc79a7", "*", "distilled, at the small size's rate"),
    "scratch, own rate": ("#d55e00", "*", "small from scratch, at its own rate"),
}
"""Colour (told apart by colour-blind eyes), marker and name of every arm."""


FEW_SIZES = 3
"""With no more different sizes than these at the end, rows are drawn by name."""


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the pictures of every study into a folder."""
    paths = []
    for study, members in grouped(results, lambda result: result["study"]).items():
        sizes = {round(statistics.fmean(member["sizes"])) for member in members}
        for name, picture in (("size", draw_sizes if len(sizes) > FEW_SIZES else draw_rows), ("time", draw_times)):
            paths.append(folder / f"{study}_{name}.png")
            picture(members, paths[-1])
        ranked = [result for result in members if result.get("ranking")]
        if ranked:
            paths.append(folder / f"{study}_ranking.png")
            draw_rankings(ranked, paths[-1])
    return paths


def draw_sizes(results: Sequence[Result], path: Path) -> None:
    """The figure against the final state size, bars for the spread over seeds."""
    axes, figure = _axes("states at the end", f"test {results[0]['metric']}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    for group, members in grouped(results, lambda result: result["group"]).items():
        points = sorted(_point(same) for same in grouped(members, lambda result: result["name"]).values())
        colour, marker, label = STYLES[group]
        axes.errorbar(*zip(*points, strict=True), color=colour, marker=marker, label=label, capsize=2, alpha=0.85)
    axes.legend(frameon=False, fontsize=7)
    save(figure, path)


def draw_rows(results: Sequence[Result], path: Path) -> None:
    """The figure of every seed and their mean, a line for each row."""
    rows = grouped(results, lambda result: result["name"])
    axes, figure = _axes(f"test {results[0]['metric']}", "")
    figure.set_figheight(1 + 0.25 * len(rows))
    for height, members in enumerate(rows.values()):
        colour, marker, _ = STYLES[members[0]["group"]]
        figures = [figure_of(member) for member in members]
        axes.plot(figures, [height] * len(figures), color=colour, marker=marker, linestyle="", alpha=0.5)
        axes.plot(statistics.fmean(figures), height, color=colour, marker="|", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [f"{name} ({_size(members):g})" for name, members in rows.items()], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.3)
    save(figure, path)


def draw_times(results: Sequence[Result], path: Path) -> None:
    """The figure against the seconds that a row took in all, and the way there on the validation split."""
    axes, figure = _axes("seconds of training, those taken over included", f"{results[0]['metric']}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    named = set()
    for result in results:
        colour, marker, name = STYLES[result["group"]]
        label = None if name in named else name
        named.add(name)
        if result["curve"]:
            _, seconds, values = zip(*result["curve"], strict=True)
            axes.plot(seconds, values, color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(
            max(result["costs"]["total_seconds"], 1e-3),
            figure_of(result),
            color=colour,
            marker=marker,
            label=label,
            linestyle="",
        )
    axes.legend(frameon=False, fontsize=7)
    save(figure, path)


def draw_rankings(results: Sequence[Result], path: Path) -> None:
    """Correlation with the final order, and overlap of the best states, over training."""
    axes, figure = _axes("share of training", "agreement with the order at the end")
    for result in results:
        for ranking in result["ranking"]:
            shares = [point["share"] for point in ranking["points"]]
            label = f"{result['name']}, seed {result['seed']}"
            correlations = [point["correlation"] for point in ranking["points"]]
            (line,) = axes.plot(shares, correlations, marker=".", label=f"{label}: rank correlation")
            overlaps = [point["overlap"] for point in ranking["points"]]
            axes.plot(shares, overlaps, color=line.get_color(), linestyle=":", label=f"{label}: best eighth")
    axes.axvline(0.1, color=GREY, linewidth=0.7)
    axes.legend(frameon=False, fontsize=7)
    save(figure, path)


def _point(results: Sequence[Result]) -> tuple[float, float, float]:
    """Size, figure and its spread of one row over its seeds."""
    figures = [figure_of(result) for result in results]
    return _size(results), statistics.fmean(figures), statistics.stdev(figures) if len(figures) > 1 else 0.0


def _size(results: Sequence[Result]) -> float:
    """Mean state size at the end, over layers and seeds."""
    return round(statistics.fmean(statistics.fmean(result["sizes"]) for result in results), 1)


def _axes(x: str, y: str) -> tuple[Any, Figure]:
    """One panel."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes, figure
