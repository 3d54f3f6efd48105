"""Files that are there whole or not at all."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from hf_compressm.files import atomic
from hf_compressm.files.atomic import read_json, sync_and_sum, write_json
from hf_compressm.utils.checks import quoted


OLD = {"old": 1}


class Broken(OSError):
    """What the patched system call raises."""


def refuse(*args: Any, **kwargs: Any) -> None:
    raise Broken("No space left on device")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "values.json"
    write_json(path, OLD)
    return path


def only(path: Path) -> bool:
    return [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_is_written_is_read_and_nothing_else_is_left(written: Path) -> None:
    assert read_json(written) == OLD
    write_json(written, {"new": [1, None, "é", 0.1]})
    assert read_json(written) == {"new": [1, None, "é", 0.1]}
    assert only(written)


def test_a_written_file_has_the_rights_of_any_other_file(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_old_file_survives_a_write_that_fails(written: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(Broken):
            write_json(written, {"new": 2})
    assert read_json(written) == OLD
    assert only(written)


def test_an_interruption_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_json(written, {"new": 2})
    assert read_json(written) == OLD
    assert only(written)


def test_a_directory_that_cannot_be_flushed_is_no_error(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", refuse)
    atomic.sync_directory(written.parent)


def test_a_missing_directory_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "nowhere" / "values.json", OLD)


def nested(depth: int) -> list:
    values: list = []
    for _ in range(depth):
        values = [values]
    return values


@pytest.mark.parametrize(
    "values", [{"a": math.nan}, [math.inf], {"a": {1, 2}}, {"a": b"x"}, nested(100_000)], ids=lambda value: type(value)
)
def test_what_is_not_json_is_refused_and_the_old_file_stays(written: Path, values: Any) -> None:
    with pytest.raises(ValueError, match=r"values\.json.*not JSON"):
        write_json(written, values)
    assert read_json(written) == OLD
    assert only(written)


BAD_CONTENT = {
    "empty": b"",
    "truncated": json.dumps({"a": [1, 2, 3]}).encode()[:-3],
    "not JSON": b"plain words",
    "not text": b"\xff\xfe\x00\x80",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "deeply nested": b'{"a":' * 100_000,
    "deeply nested and whole": b"[" * 100_000 + b"]" * 100_000,
    "a number of many digits": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_a_file_that_holds_no_whole_object_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "values.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"values\.json"):
        read_json(path)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"values\.json cannot be read"):
        read_json(tmp_path / "values.json")
    with pytest.raises(ValueError, match=rf"{tmp_path.name} cannot be read"):
        read_json(tmp_path)


def test_length_and_checksum_of_a_file_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 4)
    whole = sync_and_sum(path)
    monkeypatch.setattr(atomic, "CHUNK_BYTES", 100)
    assert sync_and_sum(path) == whole
    assert whole["bytes"] == 1024


@pytest.mark.parametrize(
    "value",
    [nested(100_000), ["x" * 10**6] * 100, {"a" * 10**6: 1}, list(range(10**6))],
    ids=lambda value: type(value),
)
def test_a_value_is_quoted_in_a_line_whatever_its_size(value: Any) -> None:
    assert len(quoted(value)) <= 120


@pytest.mark.parametrize("value", [0, -1.5, True, None, "half", [3], {"a": 1}, math.nan])
def test_a_small_value_is_quoted_whole(value: Any) -> None:
    assert quoted(value) == repr(value)
