"""Plots over the steps of a run, from the Trainer's log: loss and pace with the cuts marked, and rank stability."""

from pathlib import Path
from typing import Any

from hf_compressm.compression.log import PACE, STABILITY
from hf_compressm.reports.plots.figures import COLOURS, MARKERS, new_figure, save_figure
from hf_compressm.reports.traces import Run


CUT_COLOUR = "#555555"
ROBUST_SHARE = 0.98  # of the losses fits on the axis: the large first ones would leave no room for the others


def plot_training(run: Run, path: str | Path) -> Path:
    """Draw loss and steps per second over the steps, with a line at every cut.

    Args:
        run: with a log.
        path: of the image; its ending chooses the format.

    Returns:
        The path.

    Raises:
        ValueError: if the log has no loss.
        ImportError: without matplotlib.
    """
    series = {"training loss": run.series("loss"), "validation loss": run.series("eval_loss")}
    if not any(series.values()):
        raise ValueError(f"The log of {run.name} has no loss to draw.")
    paces = run.series(PACE)
    figure = new_figure(7.6, 5.6 if paces else 3.8)
    panels = figure.subplots(2 if paces else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if paces else None)
    upper = panels[0, 0]
    for number, (label, points) in enumerate(series.items()):
        if points:
            _draw(upper, points, number, label)
    upper.set_ylabel("loss")
    _fit(upper, [value for points in series.values() for _, value in points])
    if paces:
        _draw(panels[1, 0], paces, 2, "")
        panels[1, 0].set_ylabel("training steps\nper second")
        panels[1, 0].set_ylim(bottom=0)
    for panel in panels.flat:
        _mark_cuts(panel, run, named=panel is upper)
        panel.grid(alpha=0.25)
    upper.legend(frameon=False, fontsize=9)
    panels[-1, 0].set_xlabel("optimizer steps done")
    panels[-1, 0].set_xlim(left=0)
    upper.set_title("Loss and speed of the run" if paces else "Loss of the run", fontsize=11)
    return save_figure(figure, path)


def plot_stability(run: Run, path: str | Path) -> Path:
    """Draw how well each ranking of the states agrees with the one measured before it, over the steps.

    Args:
        run: with a log; rankings are measured with `trigger="stable"`.
        path: of the image; its ending chooses the format.

    Returns:
        The path.

    Raises:
        ValueError: if no ranking was measured.
        ImportError: without matplotlib.
    """
    points = run.series(STABILITY)
    if not points:
        raise ValueError(f'The log of {run.name} has no {STABILITY}; rankings are measured with trigger="stable".')
    figure = new_figure(7.6, 3.6)
    axes = figure.subplots()
    _draw(axes, points, 0, "agreement with the measurement before")
    wanted = run.settings.get("stability")
    if isinstance(wanted, float):
        axes.axhline(wanted, color=COLOURS[1], linestyle="--", linewidth=1.2, label=f"asked for: {wanted:g}")
    _mark_cuts(axes, run, named=True)
    axes.set(xlabel="optimizer steps done", ylabel="rank correlation (1 is the same order)")
    axes.set_ylim(top=1.02)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    axes.set_title("How settled the ranking of the states is", fontsize=11)
    return save_figure(figure, path)


def _draw(axes: Any, points: list[tuple[int, float]], number: int, label: str) -> None:
    """Draw a curve, with markers if there are few points."""
    steps, values = zip(*points, strict=True)
    marker = MARKERS[number % len(MARKERS)] if len(points) <= 60 else ""
    style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6, "marker": marker, "markersize": 4}
    axes.plot(steps, values, label=label or None, **style)


def _fit(axes: Any, values: list[float]) -> None:
    """Let the many losses decide the axis, not the few large ones of the first steps."""
    ordered = sorted(values)
    largest = ordered[min(int(ROBUST_SHARE * len(ordered)), len(ordered) - 1)]
    margin = 0.06 * max(largest - ordered[0], 1e-12)
    axes.set_ylim(ordered[0] - margin, largest + margin)


def _mark_cuts(axes: Any, run: Run, named: bool) -> None:
    """Draw a line at each cut and at each rollback."""
    labels = {"cut": "cut", "rolled back": "rolled back"}
    for event in run.cuts:
        style = "-" if event.outcome == "cut" else ":"
        label = labels.pop(event.outcome, None) if named else None
        axes.axvline(event.step, color=CUT_COLOUR, linestyle=style, linewidth=0.9, alpha=0.8, label=label)
