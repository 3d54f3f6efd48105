"""Plots of a run's log."""

from pathlib import Path

import pytest

from hf_compressm.reports.pictures import draw_pictures, present_pictures
from hf_compressm.reports.plots.bars import plot_before_after, plot_cut_cost
from hf_compressm.reports.plots.curves import plot_stability, plot_training
from hf_compressm.reports.traces import Run, read_run
from tests.reports.example_runs import train
from tests.reports.plots.test_spectra import assert_is_picture, cut_events


STABLE = {"trigger": "stable", "stability": 0.5, "interval": 1, "stability_window": 1, "end": 8, "fraction": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "stable"
    train(folder, {**STABLE, "num_cuts": 1})
    return read_run(folder)


def test_a_run_with_measured_rankings_has_every_picture(run: Run, tmp_path: Path) -> None:
    pictures = draw_pictures(run, tmp_path)
    names = ["before_after", "training", "state_sizes", "spectra", "stability", "cut_cost"]
    assert [picture.path.stem for picture in pictures] == names
    for picture in pictures:
        assert_is_picture(picture.path)
        assert picture.caption
    assert present_pictures(tmp_path) == pictures
    assert present_pictures(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("plot", [plot_training, plot_stability, plot_before_after, plot_cut_cost])
def test_what_is_not_there_is_not_drawn(plot, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no"):
        plot(Run("empty"), tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_a_run_without_a_log_has_the_pictures_of_its_cuts(tmp_path: Path) -> None:
    run = Run("bare", events=tuple(cut_events()), steps=12)
    names = [picture.path.stem for picture in draw_pictures(run, tmp_path)]
    assert names == ["before_after", "state_sizes", "spectra", "cut_cost"]


@pytest.mark.parametrize(("plot", "key"), [(plot_training, "loss"), (plot_training, "eval_loss")])
def test_one_loss_or_one_point_is_enough(plot, key: str, tmp_path: Path) -> None:
    run = Run("short", log=({"step": 1, key: 0.0},))
    assert_is_picture(plot(run, tmp_path / "plot.png"))
