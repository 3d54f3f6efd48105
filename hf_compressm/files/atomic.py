"""Atomic files, which exist whole or not at all: written under another name, flushed to the disk, and renamed.

A file that is read back may come from a crash or from a stranger, so error messages show its content only in part.
"""

import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


CHUNK_BYTES = 1 << 22
PATIENCE = (0.02, 0.1, 0.5)
"""Seconds to wait before a file is replaced once more that another program holds open."""


def write_json(path: str | Path, values: Any) -> None:
    """Write JSON as `write_text` does.

    Args:
        path: path of the file; its directory must exist.
        values: values that JSON can hold; NaN and infinity are refused, since other readers refuse them.

    Raises:
        OSError: from the file system; the earlier file is then untouched.
        ValueError: if the values are not JSON.
    """
    try:
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} was not written, since its values are not JSON: {error}.") from error
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Write text so that a reader finds either the old file or the new one, even after a crash or a power cut.

    Args:
        path: path of the file; its directory must exist.
        text: the new content.

    Raises:
        OSError: from the file system; the earlier file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # with the usual permissions, unlike a file of tempfile; and the same bytes on every system
    file = temporary.open("x", encoding="utf-8", newline="\n")
    try:
        with file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: naming the file, if it is missing or does not hold a whole JSON object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole, or not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}; an object is needed.")
    return values


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield a hidden directory to fill; give it its name at the end, or remove it if filling it fails.

    Args:
        path: final path of the directory; nothing but an empty directory may exist there.

    Raises:
        OSError: from the file system; nothing is left behind.
    """
    path = Path(path).absolute()
    place = next(folder for folder in path.parents if folder.is_dir())  # exists: no parents are left either
    temporary = place / f".{path.name}.{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():  # Windows cannot rename onto a directory
            path.rmdir()
        replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def replace(source: Path, target: Path) -> None:
    """Rename a file or directory, also onto a file.

    Windows refuses that while another program has the file open, such as a virus scanner or a viewer of logs: then it
    is tried again for a moment.

    Raises:
        OSError: from the file system.
    """
    for seconds in PATIENCE:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    return os.replace(source, target)


def sync_and_sum(path: Path) -> dict[str, int]:
    """Flush a file that other code wrote to the disk, and return its length in bytes and its CRC-32."""
    sync_file(path)
    return sum_of(path)


def sum_of(path: Path) -> dict[str, int]:
    """Length of a file in bytes, and its CRC-32."""
    length = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            length += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": length, "crc32": checksum}


def sync_file(path: Path) -> None:
    """Flush a file that other code wrote to the disk.

    Windows flushes only what is open for writing. A file that may only be read is flushed where the system can.
    """
    try:
        file = path.open("r+b")
    except PermissionError:
        _sync_if_possible(path)
    else:
        with file:
            os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, where the system can; Windows cannot open directories."""
    _sync_if_possible(path)


def _sync_if_possible(path: Path) -> None:
    """Flush what is open for reading alone, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
