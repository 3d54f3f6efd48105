"""Files that are there whole or not at all: written beside, flushed to the disk, and renamed into place.

What is read back may come from a crash or from a stranger, so that an error shows it only in part.
"""

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


CHUNK_BYTES = 1 << 22


def write_json(path: str | Path, values: Any) -> None:
    """Write JSON as `write_text` does.

    Args:
        path: of the file; its directory must be there.
        values: JSON-ready; NaN and infinity are refused, since other readers would be.

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
    """Write text so that a reader finds the old file or the new one, after a crash and a power cut too.

    Args:
        path: of the file; its directory must be there.
        text: of it.

    Raises:
        OSError: from the file system; the earlier file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = temporary.open("x", encoding="utf-8")  # readable by whom the files beside it are, unlike one of tempfile
    try:
        with file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
    """A hidden directory to fill, which gets its name at the end; it is removed if filling it fails.

    Args:
        path: of the directory; nothing may be there but an empty one.

    Raises:
        OSError: from the file system; nothing is then left.
    """
    path = Path(path).absolute()
    place = next(folder for folder in path.parents if folder.is_dir())  # so that no parents are left either
    temporary = place / f".{path.name}.{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():  # Windows renames onto nothing
            path.rmdir()
        os.replace(temporary, path)
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


def sync_and_sum(path: Path) -> dict[str, int]:
    """Flush a file that others wrote to the disk; its length in bytes and its CRC-32."""
    length = checksum = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(CHUNK_BYTES):
            length += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": length, "crc32": checksum}


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, where the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
