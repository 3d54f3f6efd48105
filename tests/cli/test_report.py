"""`hf-compressm report` as a user meets it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import complaint, run
from tests.family_table import LRU
from tests.reports.example_runs import train


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(folder)
    return folder


def test_a_report_is_written_where_the_run_is(run_folder: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "report", run_folder)
    assert code == 0
    assert out == f"Written: {run_folder / 'report.html'}.\n"
    assert "error" not in err


def test_it_may_go_elsewhere_and_speak_to_programs(run_folder: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "report", run_folder, "--output", tmp_path / "new" / "place", "--json")
    assert code == 0
    found = json.loads(out)
    place = tmp_path / "new" / "place"
    assert found == {"html": str(place / "report.html")}
    assert Path(found["html"]).exists()
    assert run(capsys, "report", run_folder, "--output", tmp_path, "--quiet")[:2] == (0, "")


def test_the_likeliest_mistakes_are_one_line(
    run_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is not a directory. Give the output_dir of a run" in complaint(capsys, "report", tmp_path / "typo")
    LRU.build().save_pretrained(tmp_path / "uncut")
    assert "has no record of a cut" in complaint(capsys, "report", tmp_path / "uncut")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/report"):
        with monkeypatch.context() as patch:
            patch.setattr("hf_compressm.reports.report.read_run", None)  # found before anything is read
            assert f"{place} cannot be written" in complaint(capsys, "report", run_folder, "--output", place)
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert "pip install hf_compressm[plot]" in complaint(capsys, "report", run_folder)
