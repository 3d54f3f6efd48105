"""Places that results will be written to, checked before the work that they are results of.

Nothing here imports torch or transformers, so that a command line can check first of all.
"""

import os
import tempfile
from pathlib import Path


def check_new_directory(path: str | Path, source: str | Path | None = None) -> None:
    """Make sure that a directory can be made, or is there and empty.

    Args:
        path: of the directory.
        source: a directory that is only read: it may not hold the new one.

    Raises:
        ValueError: naming the path and the reason.
    """
    path = Path(path)
    if source is not None and _resolved(path).is_relative_to(_resolved(Path(source))):
        raise ValueError(f"output {path} is {source} or inside it. Name a directory outside of the checkpoint.")
    if _mode(path) is not None and not (path.is_dir() and not _entries(path)):
        raise ValueError(f"output {path} exists and is not empty. Name a new directory.")
    _check_writing(path, path.absolute().parent)


def check_directory(path: str | Path) -> None:
    """Make sure that files can be written into a directory, which is made if it is missing.

    Raises:
        ValueError: naming the path and the reason.
    """
    _check_writing(Path(path), Path(path).absolute())


def check_file(path: str | Path) -> None:
    """Make sure that a file can be written, in a directory that is made if it is missing.

    Raises:
        ValueError: naming the path and the reason.
    """
    path = Path(path)
    if _mode(path) is not None and not (path.is_file() and os.access(path, os.W_OK)):
        raise ValueError(f"{path} exists and is not a file that may be written over. Name another one.")
    _check_writing(path, path.absolute().parent)


def _check_writing(path: Path, folder: Path) -> None:
    """Raise `ValueError` unless files or folders can be made in the nearest part of a folder's path that exists."""
    place = next(each for each in (folder, *folder.parents) if _mode(each) is not None)
    try:
        with tempfile.TemporaryDirectory(prefix=".compressm-", dir=place):  # permissions alone do not tell
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {place}: {error.strerror or error}. Name another place."
        ) from error


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, which older Pythons report in their own way
        raise ValueError(f"{path} is not a path that can be followed: {error}.") from error


def _mode(path: Path) -> int | None:
    """The kind of what exists at a path; None if nothing does; `ValueError` where nothing can be."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero, a folder that is closed to us
        raise ValueError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def _entries(path: Path) -> bool:
    """Whether a directory holds something; `ValueError` if it may not be listed."""
    try:
        return any(path.iterdir())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}. Name another directory.") from error
