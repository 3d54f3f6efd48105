"""Files that are there whole or not at all."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from hf_compressm.files import atomic
from hf_compressm.files.atomic import read_json, replace, sum_of, sync_and_sum, sync_file, write_json, write_text
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


def test_files_are_flushed_where_only_those_open_for_writing_can_be(windows: None, written: Path) -> None:
    content, times = written.read_bytes(), written.stat().st_mtime_ns
    assert sync_and_sum(written) == sum_of(written)
    assert (written.read_bytes(), written.stat().st_mtime_ns) == (content, times)
    write_json(written, {"new": 1})
    assert read_json(written) == {"new": 1}


def test_a_file_that_may_only_be_read_is_flushed_where_the_system_can(
    windows: None, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_read(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "+" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", only_read)
    sync_file(written)
    assert sync_and_sum(written)["bytes"] == written.stat().st_size


def test_an_error_of_the_disk_is_not_passed_over(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(Broken):
        sync_and_sum(written)
    assert sum_of(written)["bytes"] == written.stat().st_size  # reading flushes nothing


@pytest.mark.parametrize(("busy", "ends_well"), [(1, True), (3, True), (4, False)])
def test_a_file_that_another_program_holds_open_is_replaced_a_moment_later(
    busy: int, ends_well: bool, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, rename = [], os.replace

    def held(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) <= busy:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(atomic, "PATIENCE", (0.0, 0.0, 0.0))
    if ends_well:
        write_json(written, {"new": 1})
        assert read_json(written) == {"new": 1}
    else:
        with pytest.raises(PermissionError):
            write_json(written, {"new": 1})
        assert read_json(written) == OLD
    assert only(written)


def test_other_errors_of_replacing_are_not_tried_again(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "PATIENCE", (1000.0,))
    with pytest.raises(FileNotFoundError):
        replace(written.parent / "nothing", written)


def test_text_is_the_same_bytes_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_path = [], Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: opened.append(kwargs) or open_path(*args, **kwargs))
    write_text(tmp_path / "card.md", "ä\nb\r\n")
    assert (tmp_path / "card.md").read_bytes() == b"\xc3\xa4\nb\r\n"
    assert opened[0] == {"encoding": "utf-8", "newline": "\n"}  # None would write CR LF on Windows


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
