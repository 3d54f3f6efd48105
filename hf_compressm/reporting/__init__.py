"""What a run looked like: plots of its cuts."""

from .plots import plot_spectra, plot_state_sizes


__all__ = ["plot_spectra", "plot_state_sizes"]
