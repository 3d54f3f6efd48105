"""Plots of the cuts of a run: spectra and state sizes. They need matplotlib, an optional dependency."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_compressm.compression.history import CutEvent
from hf_compressm.reports.plots.figures import COLOURS, MARKERS, SMALLEST_SHARE, new_figure, save_figure


MAX_COLUMNS = 4


def plot_spectra(events: Sequence[CutEvent], path: str | Path) -> Path:
    """Draw each layer's Hankel singular values at every cut, logarithmically, and mark what each cut kept.

    Attempts that a guard undid are left out.

    Values are drawn over the number of states they take: the real realization of S5 and LRU layers has two values per
    state. The solid part of a curve up to its marker was kept, the dotted part after it was cut off.

    Args:
        events: cuts, oldest first, as in `CompreSSMCallback.events`.
        path: of the image; its ending chooses the format.

    Returns:
        The path.

    Raises:
        ValueError: without events.
        ImportError: without matplotlib.
    """
    events = [event for event in events if event.outcome in ("cut", "unchanged")]
    names = _layer_names(events)
    columns = min(len(names), MAX_COLUMNS)
    rows = math.ceil(len(names) / columns)
    figure = new_figure(max(4.2 * columns, 6.4), 3.0 * rows + 1.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, name in zip(panels.flat, names, strict=False):
        for number, event in enumerate(events):
            _draw_spectrum(panel, event, name, number)
        panel.set_title(name, fontsize=10)
        panel.set_yscale("log")
        panel.set_xlabel("number of states")
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", integer=True)
        panel.grid(alpha=0.25, which="major")
    for panel in panels[:, 0]:
        panel.set_ylabel("Hankel singular value\n(share of the largest)")
    for panel in list(panels.flat)[len(names) :]:
        panel.set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    figure.suptitle(
        "Hankel singular values at each cut: solid up to the marker is kept, dotted is cut off", fontsize=11
    )
    return save_figure(figure, path)


def plot_state_sizes(events: Sequence[CutEvent], path: str | Path, max_steps: int | None = None) -> Path:
    """Draw each layer's state size over the steps of training, back up where a cut was rolled back.

    Args:
        events: cuts, oldest first, as in `CompreSSMCallback.events`.
        path: of the image; its ending chooses the format.
        max_steps: length of the run, up to which the last size is drawn; by default a little beyond the last cut.

    Returns:
        The path.

    Raises:
        ValueError: without events.
        ImportError: without matplotlib.
    """
    events = [event for event in events if event.outcome != "undone"]
    names = _layer_names(events)
    last = max(max_steps or 0, events[-1].step)
    if max_steps is None:
        last = round(1.15 * last) + 1
    layers_by_history: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name in names:
        layers_by_history.setdefault(_size_history(events, name, last), []).append(name)
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    for number, (history, layers) in enumerate(layers_by_history.items()):
        steps, sizes = zip(*history, strict=True)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        label = _joined(layers, len(names))
        axes.step(steps, sizes, where="post", color=colour, linewidth=1.8, alpha=0.9, label=label)
        axes.plot(steps[1:-1], sizes[1:-1], linestyle="", marker=marker, markeredgecolor="white", color=colour)
    axes.set(xlabel="optimizer steps done", ylabel="state size (states per layer)", xlim=(0, last))
    axes.set_ylim(bottom=0)
    axes.locator_params(integer=True)
    axes.grid(alpha=0.25)
    axes.set_title("State size of each layer; markers are cuts", fontsize=11)
    size = 9 if len(layers_by_history) <= MAX_COLUMNS else 7
    figure.legend(loc="outside lower center", ncols=2, fontsize=size, frameon=False)
    return save_figure(figure, path)


def _layer_names(events: Sequence[CutEvent]) -> list[str]:
    """Names of all layers in the events, in model order."""
    if not events:
        raise ValueError("There is no cut to draw: events is empty. Plot after a run whose callback has made a cut.")
    return list(dict.fromkeys(layer.name for event in events for layer in event.result.plan.layers))


def _draw_spectrum(panel: Any, event: CutEvent, name: str, number: int) -> None:
    """Draw one curve: the kept values solid, a marker on the last of them, the others dotted."""
    layer = next((layer for layer in event.result.plan.layers if layer.name == name), None)
    if layer is None or layer.hankel_singular_values.numel() == 0:
        return
    sigma = layer.hankel_singular_values.double()
    shares = (sigma / sigma.max()).clamp(min=SMALLEST_SHARE).tolist()
    per_state = len(shares) / layer.state_size  # 2 for the real realization of a complex system, else 1
    states = [(index + 1) / per_state for index in range(len(shares))]
    kept = max(round(layer.new_state_size * per_state), 1)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    label = f"after step {event.step}"
    panel.plot(states[kept - 1 :], shares[kept - 1 :], color=colour, linestyle=":", linewidth=1.4)
    style = {"color": colour, "linewidth": 1.6, "marker": marker, "markeredgecolor": "white"}
    size = max(10 - number, 5)  # cuts at the same place stay visible behind one another
    panel.plot(states[:kept], shares[:kept], markevery=[kept - 1], markersize=size, label=label, **style)


def _size_history(events: Sequence[CutEvent], name: str, last: int) -> tuple[tuple[int, int], ...]:
    """Pairs of a step and the state size from that step on: the start, every cut, the end."""
    history: list[tuple[int, int]] = []
    for event in events:
        for layer in event.result.plan.layers:
            if layer.name == name:
                history += [] if history else [(0, layer.state_size)]
                history.append((event.step, layer.new_state_size))
    return (*history, (last, history[-1][1]))


def _joined(names: Sequence[str], total: int) -> str:
    """One label for layers with the same history of sizes."""
    if len(names) == total > 1:
        return f"all {total} layers"
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"
