"""Pictures of the benchmarks: ratios against goals, cost against length and sizes, predicted changes of a loss."""

import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import Row


BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555"
"""Told apart by colour-blind eyes."""


def draw_goals(rows: Sequence[Row], path: Path) -> None:
    """A bar per peer: how many times faster (or smaller) ours is, the range over rounds, and the goal as a line."""
    bars = [(row, peer) for row in rows for peer in row.peers if row.peers[peer]]
    figure = Figure(figsize=(10, 1 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for position, (row, peer) in enumerate(bars):
        ratios, best = row.ratios(peer), min(row.peers[peer]) / min(row.ours)
        axes.barh(position, best, color=BLUE, height=0.6)
        axes.plot([min(ratios), max(ratios)], [position, position], color="black", linewidth=1.5)
        goal = row.wanted.get(peer)
        if goal is not None:
            axes.plot([goal, goal], [position - 0.42, position + 0.42], color=ORANGE, linewidth=3)
        end = max(best, *ratios, goal or 0)
        axes.text(end * 1.08, position, f"{best:.3g}", va="center", fontsize=8, color=GREY)
    names = [textwrap.fill(f"{row.goal} against {peer}: {row.work}", width=58) for row, peer in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("peer's figure over ours\n(black: range over rounds; orange: the goal)")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_scaling(curves: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """A panel per quantity, a curve per scan, and a dotted line of cost in proportion."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (quantity, scans) in zip(panels, curves.items(), strict=True):
        for (name, points), colour, marker in zip(scans.items(), (BLUE, ORANGE), "os", strict=False):
            sizes, seconds = zip(*points, strict=True)
            axes.plot(sizes, seconds, color=colour, marker=marker, markersize=4, label=name)
            axes.plot(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], color=colour, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel=quantity)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("forward and backward, s\n(dotted: in proportion)")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_loss_changes(points: Sequence[tuple[str, float, float]], path: Path) -> None:
    """Predicted changes of the loss against measured ones, by arm, and how far apart a factor of two is.

    Args:
        points: arm, predicted and measured change of each cut; those that are not positive cannot be drawn.
        path: of the picture.
    """
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    drawn = [point for point in points if min(point[1:]) > 0]
    arms = list(dict.fromkeys(arm for arm, _, _ in drawn))
    for arm, colour, marker in zip(arms, cycle((BLUE, ORANGE, GREEN, PINK)), cycle("osD^"), strict=False):
        _, predicted, measured = zip(*(point for point in drawn if point[0] == arm), strict=True)
        axes.plot(measured, predicted, color=colour, marker=marker, markersize=4, linestyle="", label=arm, alpha=0.8)
    changes = [change for _, *both in drawn for change in both]
    ends = [min(changes, default=0.01), max(changes, default=1.0)]
    for factor, style in ((0.5, ":"), (1, "-"), (2, ":")):
        axes.plot(ends, [factor * end for end in ends], color=GREY, linewidth=0.8, linestyle=style)
    axes.set(xscale="log", yscale="log", xlabel="measured change of the held-out loss", ylabel="predicted change")
    axes.spines[["top", "right"]].set_visible(False)
    if arms:
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    FigureCanvasAgg(figure).print_figure(path, dpi=130)
