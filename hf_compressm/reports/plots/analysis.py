"""Picture of an analysis: every layer's spectrum, and the sizes that tolerances would give the layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_compressm.compression import Alternative, LayerPlan
from hf_compressm.reports.plots.figures import COLOURS, MARKERS, SMALLEST_SHARE, new_figure, save_figure


def plot_alternatives(alternatives: Sequence[Alternative], path: str | Path) -> Path:
    """Draw the Hankel singular values of all layers, logarithmically, and beside them each layer's recommended size.

    Args:
        alternatives: of one model, from `compare_tolerances`; at least one.
        path: of the image; its ending chooses the format.

    Returns:
        The path.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    layers = alternatives[0].plan.layers
    for number, layer in enumerate(layers):
        _draw_spectrum(left, layer, number / max(len(layers) - 1, 1))
    left.set(yscale="log", xlabel="number of states", ylabel="Hankel singular value\n(share of the largest)")
    left.set_title(f"Spectra of {len(layers)} layers, first (dark) to last (light)", fontsize=11)
    places = list(range(len(layers)))
    right.plot(places, [layer.state_size for layer in layers], color="black", linestyle=":", label="now")
    for number, alternative in enumerate(alternatives):
        sizes = [layer.new_state_size for layer in alternative.plan.layers]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        right.plot(places, sizes, markersize=5, label=f"tolerance {alternative.tolerance:g}", **style)
    right.set(xlabel="layer", ylabel="state size (states per layer)")
    right.set_ylim(bottom=0)
    right.set_title("Recommended state sizes", fontsize=11)
    right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (left, right):
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.25)
    return save_figure(figure, path)


def _draw_spectrum(axes: Any, layer: LayerPlan, depth: float) -> None:
    """Draw one curve over the number of states that its values take; darker blue for early layers."""
    sigma = layer.hankel_singular_values
    if not float(sigma.nan_to_num().sum()) > 0:
        return
    shares = (sigma / sigma[0]).clamp(min=SMALLEST_SHARE).tolist()
    states = [(index + 1) * layer.state_size / len(shares) for index in range(len(shares))]
    axes.plot(states, shares, color=(0.75 * depth, 0.25 + 0.5 * depth, 0.45 + 0.45 * depth), linewidth=1.5)
