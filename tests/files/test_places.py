"""Places for results are checked before the work, and checking leaves nothing behind."""

import os
from pathlib import Path

import pytest

from hf_compressm.files.places import check_directory, check_file, check_new_directory


def test_what_can_be_written_is_accepted_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.html").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for path in ("new", "empty", "a/b/c", tmp_path / "x", Path("y")):
        check_new_directory(path, tmp_path / "full")
    for path in ("new", "full", "a/b", "."):
        check_directory(path)
    for path in ("full/old.html", "full/new.png", "a/b.png", "c.png"):
        check_file(path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("check", [check_new_directory, check_directory, check_file])
@pytest.mark.parametrize("place", ["file/new", "file/a/b", "x" * 300, "nul\0l"])
def test_what_cannot_be_is_named(check, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        check(tmp_path / place)


@pytest.mark.parametrize("check", [check_new_directory, check_directory, check_file])
def test_a_folder_that_may_not_be_written_is_named(check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"new cannot be written: .*: Permission denied. Name another place"):
        check(tmp_path / "new")


def test_what_is_there_and_a_place_inside_the_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for place in ("model", "model/config.json"):
        with pytest.raises(ValueError, match="exists and is not empty"):
            check_new_directory(tmp_path / place)
    for place in ("model", "model/small", "link/small", "model/../model/a"):
        with pytest.raises(ValueError, match="or inside it"):
            check_new_directory(tmp_path / place, tmp_path / "model")
    with pytest.raises(ValueError, match="exists and is not a file"):
        check_file(tmp_path / "model")
