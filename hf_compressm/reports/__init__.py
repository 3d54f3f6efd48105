"""A run explained to others: its traces, the report, the model card, pictures, and the push to the Hub."""

from hf_compressm.reports.checkpoint import compress_checkpoint
from hf_compressm.reports.pictures import draw_pictures
from hf_compressm.reports.plots.spectra import plot_spectra, plot_state_sizes
from hf_compressm.reports.report import write_report
from hf_compressm.reports.traces import Run, read_run


__all__ = [
    "Run",
    "compress_checkpoint",
    "draw_pictures",
    "plot_spectra",
    "plot_state_sizes",
    "read_run",
    "write_report",
]
