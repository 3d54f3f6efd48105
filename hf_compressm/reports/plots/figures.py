"""What pictures share: colours, a figure of one's own, and writing it. Needs matplotlib, an optional dependency."""

from pathlib import Path
from typing import Any


# Okabe and Ito's colours, told apart by all kinds of colour vision; yellow is left out for want of contrast on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SMALLEST_SHARE = 1e-8  # of the largest singular value: what lies below is round-off and would only stretch the axis


def new_figure(width: float, height: float) -> Any:
    """A figure of its own canvas: neither pyplot's global state nor the user's back end is touched."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install hf_compressm[plot]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write it, in the format that the path's ending chooses; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
