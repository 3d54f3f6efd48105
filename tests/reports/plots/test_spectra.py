import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_compressm import CompreSSMConfig, LRUConfig, LRUForSequenceClassification, compress
from hf_compressm.compression.history import CutEvent
from hf_compressm.reports import plot_spectra, plot_state_sizes


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FEWEST_COLOURS = 20  # an empty figure has two


def cut_events(layers: int = 2, cuts: int = 2) -> list[CutEvent]:
    """Real cuts of a small LRU, whose spectra have two values per state."""
    torch.manual_seed(0)
    config = LRUConfig(input_size=1, hidden_size=4, state_size=16, num_hidden_layers=layers, num_labels=2)
    model = LRUForSequenceClassification(config)
    return [CutEvent(5 * cut, compress(model, CompreSSMConfig(tolerance=0.2))) for cut in range(1, cuts + 1)]


def assert_is_picture(path) -> None:
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > FEWEST_COLOURS


@pytest.mark.parametrize(("plot", "layers", "cuts"), [(plot_spectra, 5, 8), (plot_state_sizes, 1, 1)])
def test_a_plot_is_a_picture(plot, layers, cuts, tmp_path):
    path = tmp_path / "folder" / "plot.png"
    assert plot(cut_events(layers, cuts), str(path)) == path
    assert_is_picture(path)


def test_the_spectrum_has_two_values_per_state():
    for layer in cut_events()[0].result.plan.layers:
        assert layer.hankel_singular_values.numel() == 2 * layer.state_size


def test_a_zero_spectrum_is_drawn(tmp_path):
    event = cut_events(cuts=1)[0]
    layers = event.result.plan.layers
    dead = replace(layers[0], hankel_singular_values=torch.zeros(32, dtype=torch.float64))
    plan = replace(event.result.plan, layers=(dead, *layers[1:]))
    event = CutEvent(event.step, replace(event.result, plan=plan))
    assert_is_picture(plot_spectra([event], tmp_path / "plot.png"))


def test_the_length_of_the_run_changes_the_picture(tmp_path):
    events = cut_events()
    short = plot_state_sizes(events, tmp_path / "short.png").read_bytes()
    assert plot_state_sizes(events, tmp_path / "long.png", max_steps=500).read_bytes() != short


@pytest.mark.parametrize("plot", [plot_spectra, plot_state_sizes])
def test_without_cuts_there_is_nothing_to_draw(plot, tmp_path):
    with pytest.raises(ValueError, match="events is empty"):
        plot([], tmp_path / "plot.png")


@pytest.mark.parametrize("plot", [plot_spectra, plot_state_sizes])
def test_missing_matplotlib_is_named(plot, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape("pip install hf_compressm[plot]")):
        plot(cut_events(cuts=1), tmp_path / "plot.png")
