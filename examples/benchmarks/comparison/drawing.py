"""Pictures of the comparison: figure against final size and against time, and how the order of the states settles."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from plots import GREY, save
from tables import Result, figure_of, grouped


STYLES = {
    "cut": ("#0072b2", "o", "cut while training"),
    "scratch": ("#d55e00", "s", "small from scratch"),
    "prune": ("#009e73", "^", "pruned afterwards"),
    "distil": ("#cc79a7", "D", "distilled"),
    "regularise": ("#e69f00", "v", "Hankel nuclear norm"),
}
"""Colour (told apart by colour-blind eyes), marker and name of every arm."""


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the pictures of every study into a folder."""
    paths = []
    for study, members in grouped(results, lambda result: result["study"]).items():
        for name, picture in (("size", draw_sizes), ("time", draw_times)):
            paths.append(folder / f"{study}_{name}.png")
            picture(members, paths[-1])
        ranked = [result for result in members if result.get("ranking")]
        if ranked:
            paths.append(folder / f"{study}_ranking.png")
            draw_rankings(ranked, paths[-1])
    return paths


def draw_sizes(results: Sequence[Result], path: Path) -> None:
    """The figure against the final state size, a curve for each arm, bars for the spread over seeds."""
    axes, figure = _axes("states at the end", f"test {results[0]['metric']}")
    axes.set_xscale("log", base=2)
    for arm, members in grouped(results, lambda result: result["group"]).items():
        points = []
        for same in grouped(members, lambda result: result["name"]).values():
            figures = [figure_of(result) for result in same]
            size = statistics.fmean(statistics.fmean(result["sizes"]) for result in same)
            points.append((size, statistics.fmean(figures), statistics.stdev(figures) if len(figures) > 1 else 0.0))
        sizes, means, errors = zip(*sorted(points), strict=True)
        colour, marker, name = STYLES[arm]
        line = "-" if arm in ("cut", "scratch") else ""
        axes.errorbar(sizes, means, errors, color=colour, marker=marker, linestyle=line, label=name, capsize=2)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_times(results: Sequence[Result], path: Path) -> None:
    """The figure against the seconds that a row took in all, and the way there on the validation split."""
    axes, figure = _axes("seconds of training, those taken over included", f"{results[0]['metric']}")
    axes.set_xscale("log")
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
    axes.legend(frameon=False, fontsize=8)
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


def _axes(x: str, y: str) -> tuple[Any, Figure]:
    """One panel."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes, figure
