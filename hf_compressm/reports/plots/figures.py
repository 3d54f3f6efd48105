"""What pictures share: colours, new figures, and writing them. Needs matplotlib, an optional dependency."""

from pathlib import Path
from typing import Any


# Okabe and Ito's colours, distinct in every kind of colour vision; yellow is left out: too little contrast on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SMALLEST_SHARE = 1e-8  # of the largest singular value: smaller ones are round-off and would only stretch the axis


def new_figure(width: float, height: float) -> Any:
    """A figure with its own canvas: pyplot's global state and the user's back end do not change."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install hf_compressm[plot]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_format(path: str | Path) -> None:
    """Make sure that a figure can be saved under a name.

    Raises:
        ImportError: without matplotlib.
        ValueError: naming the endings that are known, if the name has none of them.
    """
    known = sorted(new_figure(1, 1).canvas.get_supported_filetypes())
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in known:
        raise ValueError(f"{path} does not say what kind of image it is: end it with .{', .'.join(known)}.")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure in the format that the path's ending chooses; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
