"""All pictures of a run that its traces allow, with what each shows in words."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_compressm.compression.log import PACE, STABILITY
from hf_compressm.reports.plots.bars import plot_before_after, plot_cut_cost
from hf_compressm.reports.plots.curves import plot_stability, plot_training
from hf_compressm.reports.plots.spectra import plot_spectra, plot_state_sizes
from hf_compressm.reports.traces import Run


@dataclass(frozen=True)
class Picture:
    """A drawn picture.

    Attributes:
        path: of the image.
        title: of what it shows.
        caption: how to read it.
    """

    path: Path
    title: str
    caption: str


def draw_pictures(run: Run, folder: str | Path) -> list[Picture]:
    """Draw every picture that the run has data for into a folder, under names that do not depend on the run.

    Args:
        run: the run whose traces are drawn.
        folder: created if it does not exist.

    Raises:
        ImportError: without matplotlib.
        OSError: from the file system.
    """
    drawn = []
    for name, title, caption, wanted, draw in _PICTURES:
        if wanted(run):
            drawn.append(Picture(draw(run, Path(folder) / f"{name}.png"), title, caption))
    return drawn


def present_pictures(folder: str | Path) -> list[Picture]:
    """The pictures that a folder has from an earlier call."""
    return [
        Picture(Path(folder) / f"{name}.png", title, caption)
        for name, title, caption, _, _ in _PICTURES
        if (Path(folder) / f"{name}.png").is_file()
    ]


def _has_spectra(run: Run) -> bool:
    return any(event.outcome in ("cut", "unchanged") for event in run.events)


_PICTURES: tuple[tuple[str, str, str, Callable[[Run], bool], Callable[[Run, Path], Path]], ...] = (
    (
        "before_after",
        "Before and after",
        "Sizes before the first cut and at the end of the run, and the median speed that was logged before and after.",
        lambda run: bool(run.cuts),
        plot_before_after,
    ),
    (
        "training",
        "Loss and speed",
        f"A vertical line is a cut. {PACE} leaves out evaluations, saves, cuts, and the first step after a cut.",
        lambda run: bool(run.series("loss") or run.series("eval_loss")),
        plot_training,
    ),
    (
        "state_sizes",
        "State sizes",
        "States of each layer over the steps of the run; layers that were cut alike share a line.",
        lambda run: any(event.outcome != "undone" for event in run.events),
        lambda run, path: plot_state_sizes(run.events, path, run.steps),
    ),
    (
        "spectra",
        "Hankel singular values",
        "What each state contributes, largest first, at every cut. The solid part up to the marker was kept, the "
        "dotted part was cut off. A curve that falls steeply has states to spare.",
        _has_spectra,
        lambda run, path: plot_spectra(run.events, path),
    ),
    (
        "stability",
        "How settled the ranking is",
        "Rank correlation of each measurement with the one before: near 1, the states no longer change places.",
        lambda run: bool(run.series(STABILITY)),
        plot_stability,
    ),
    (
        "cut_cost",
        "What the cuts took",
        "Seconds of each attempt, calibration included, and how many training steps take the same time.",
        lambda run: bool(run.events),
        plot_cut_cost,
    ),
)
