"""What a run looked like: its pictures, and the report of them."""

from .pages import write_report
from .pictures import draw_pictures
from .plots import plot_spectra, plot_state_sizes
from .runs import Run, read_run


__all__ = ["Run", "draw_pictures", "plot_spectra", "plot_state_sizes", "read_run", "write_report"]
