"""Bars of a run: the model before its cuts and after them, and what each cut cost."""

from pathlib import Path
from typing import Any

from hf_compressm.reports.plots.figures import COLOURS, new_figure, save_figure
from hf_compressm.reports.traces import Run


OUTCOME_COLOURS = {"cut": 0, "unchanged": 6, "undone": 1, "rolled back": 3}  # numbers of COLOURS


def plot_before_after(run: Run, path: str | Path) -> Path:
    """Draw pairs of bars: sizes and speed before the first cut and at the end of the run.

    Args:
        run: with a cut.
        path: of the image; its ending chooses the format.

    Returns:
        The path.

    Raises:
        ValueError: without a cut.
        ImportError: without matplotlib.
    """
    pairs = _pairs(run)
    figure = new_figure(max(2.3 * len(pairs), 4.6), 3.4)
    panels = figure.subplots(1, len(pairs), squeeze=False)
    for panel, (title, before, after) in zip(panels.flat, pairs, strict=True):
        bars = panel.bar(("before", "after"), (before, after), color=(COLOURS[6], COLOURS[0]), width=0.62)
        panel.bar_label(bars, labels=[_short(before), _short(after)], fontsize=9, padding=2)
        panel.set_title(title, fontsize=10)
        panel.set_ylim(min(0.0, before, after), 1.18 * max(before, after, 1e-12))
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle("Before the first cut, and at the end of the run", fontsize=11)
    return save_figure(figure, path)


def plot_cut_cost(run: Run, path: str | Path) -> Path:
    """Draw the seconds that each attempt to cut took, and how many training steps take as long.

    Args:
        run: with an attempt to cut.
        path: of the image; its ending chooses the format.

    Returns:
        The path.

    Raises:
        ValueError: without one.
        ImportError: without matplotlib.
    """
    if not run.events:
        raise ValueError(f"The history of {run.name} has no attempt to cut.")
    figure = new_figure(max(1.0 * len(run.events) + 2.6, 5.0), 3.4)
    axes = figure.subplots()
    pace = run.paces()[0]
    named = set()
    for place, event in enumerate(run.events):
        seconds, outcome = event.result.seconds, event.outcome
        colour = COLOURS[OUTCOME_COLOURS[outcome]]
        bars = axes.bar(place, seconds, color=colour, width=0.62, label=None if outcome in named else outcome)
        steps = f"\n{seconds * pace:.1f} steps" if pace else ""
        axes.bar_label(bars, labels=[f"{seconds:.2f} s{steps}"], fontsize=9, padding=2)
        named.add(outcome)
    axes.set_xticks(range(len(run.events)), [str(event.step) for event in run.events])
    axes.set(xlabel="after optimizer step", ylabel="seconds")
    axes.set_ylim(top=1.3 * max(max(event.result.seconds for event in run.events), 1e-9))
    axes.spines[["top", "right"]].set_visible(False)
    if len(named) > 1:
        axes.legend(frameon=False, fontsize=9)
    unit = "seconds and in steps before the first cut" if pace else "seconds"
    axes.set_title(f"What each attempt took, in {unit}", fontsize=11)
    return save_figure(figure, path)


def _pairs(run: Run) -> list[tuple[str, float, float]]:
    """Titles with both values; pairs with an unknown value are left out."""
    if not run.cuts:
        raise ValueError(f"The history of {run.name} has no cut.")
    first, last = run.cuts[0].result, run.cuts[-1].result
    found: list[tuple[str, Any, Any]] = [
        ("states per layer\n(mean)", _mean(first.state_sizes_before), _mean(last.state_sizes_after)),
        ("parameters", first.parameters_before, last.parameters_after),
        ("bytes of state\nper sequence", first.state_bytes_before, last.state_bytes_after),
        ("training steps\nper second", *run.paces()),
    ]
    return [(title, one, other) for title, one, other in found if one is not None and other is not None]


def _mean(sizes: dict[str, int]) -> float:
    return sum(sizes.values()) / len(sizes)


def _short(value: float) -> str:
    """A number that fits above a bar."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
