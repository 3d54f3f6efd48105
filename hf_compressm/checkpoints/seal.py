"""Sealing a checkpoint once all of it is on the disk, and comparing it with its seal later.

A Trainer writes weights, optimizer, scheduler, generator states and, last, its own state, one file after the other
into the final directory, so that a crash leaves a directory that looks like a checkpoint. The seal is written after
all of them and lists every file with its length and checksum.
"""

from collections.abc import Iterable
from pathlib import Path

from hf_compressm.files.atomic import read_json, sum_of, sync_and_sum, sync_directory, write_json
from hf_compressm.files.names import SEAL, TRAINER_STATE_FILE, UNFINISHED_FILE
from hf_compressm.files.weights import is_file
from hf_compressm.utils.checks import quoted


SEAL_VERSION = 1


class _LinkedSums:
    """Lengths and checksums of the files that were sealed last, for those that the next checkpoint has as hard links.

    Such a file, the base of a PEFT model, is on the disk already, and need not be read again. A file is told by its
    device and inode, its length, and when it was changed.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], dict[str, int]] = {}
        self._present: dict[tuple[int, ...], dict[str, int]] = {}

    def of(self, path: Path) -> dict[str, int]:
        """Length and checksum of a file, which is flushed to the disk."""
        found = path.stat()
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._last.get(stamp) if found.st_nlink > 1 else None
        total = self._present[stamp] = sync_and_sum(path) if known is None else known
        return total  # not looked up again: another run that seals in this process may have let it go

    def forget(self) -> None:
        """Keep those of the checkpoint whose files were all asked for, and no others."""
        self._last, self._present = self._present, {}


_SUMS = _LinkedSums()


def seal_checkpoint(directory: str | Path, paths: Iterable[Path] | None = None) -> None:
    """Flush all files of a checkpoint to the disk, then list them in `compressm.complete`.

    Args:
        directory: a checkpoint to which nothing more will be written.
        paths: its files, from `files_to_seal`; those that it has now if None.

    Raises:
        OSError: from the file system; there is then no seal.
    """
    directory = Path(directory)
    paths = files_to_seal(directory) if paths is None else paths
    files = {path.relative_to(directory).as_posix(): _SUMS.of(path) for path in paths}
    _SUMS.forget()
    for folder in {(directory / name).parent for name in files} | {directory}:
        sync_directory(folder)
    write_json(directory / SEAL, {"schema_version": SEAL_VERSION, "files": files})


def unseal_checkpoint(directory: str | Path) -> None:
    """Mark a checkpoint invalid before it is overwritten.

    Its sealed files are removed instead of overwritten, so that a copy by hard links keeps them. The Trainer's state,
    which is written last, is removed too: without it a mixture of old and new files does not count as complete.

    Args:
        directory: of a checkpoint; it need not exist.

    Raises:
        OSError: from the file system.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return
    sealed = _sealed_names(directory)
    for path in (directory / SEAL, directory / TRAINER_STATE_FILE):
        path.unlink(missing_ok=True)
    sync_directory(directory)
    for path in files_to_seal(directory):
        if path.relative_to(directory).as_posix() in sealed:
            path.unlink()


def compare_with_seal(directory: Path) -> None:
    """Make sure that no sealed file has changed since it was sealed.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    seal = read_json(directory / SEAL)
    files = seal.get("files")
    version = seal.get("schema_version")
    if not isinstance(version, int) or version > SEAL_VERSION:
        raise ValueError(
            f"{directory / SEAL} has schema_version {quoted(version)}; this package reads up to {SEAL_VERSION}."
        )
    if not isinstance(files, dict):
        raise ValueError(f"{directory / SEAL} lists no files.")
    for name, expected in files.items():
        path = directory / name
        if Path(name).anchor or ".." in Path(name).parts:  # on Windows a drive alone leads away, too
            raise ValueError(f"{directory / SEAL} lists {quoted(name)}, which is not a file of this checkpoint.")
        if not is_file(path):
            raise ValueError(f"{path} is missing.")
        try:
            found = sum_of(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
        if found != expected:
            same_length = isinstance(expected, dict) and found["bytes"] == expected.get("bytes")
            wrong = "content" if same_length else "length"
            raise ValueError(f"{path} is damaged: its {wrong} is not what was written.")


def _sealed_names(directory: Path) -> set[str]:
    """The names that a checkpoint's seal lists; empty without a seal that can be read."""
    try:
        return set(read_json(directory / SEAL).get("files") or ())
    except (ValueError, TypeError):
        return set()


def files_to_seal(directory: Path) -> list[Path]:
    """Every file below a directory, except the seal, what an interrupted write left, and transformers' marker."""
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (SEAL, UNFINISHED_FILE) and not path.name.startswith(f".{SEAL}")
    ]
