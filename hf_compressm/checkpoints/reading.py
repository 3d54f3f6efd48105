"""Reading checkpoints and saved models once, with every file verified; and finding the last whole one of a run.

A checkpoint without a seal (the crash came between the Trainer's last file and the seal, or the run had no callback)
counts if all its files can be read.
"""

import re
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

from transformers.utils import logging

from hf_compressm.checkpoints.saved_model import SavedModel
from hf_compressm.checkpoints.seal import compare_with_seal
from hf_compressm.checkpoints.sealing import wait_for_seal
from hf_compressm.files.atomic import read_json
from hf_compressm.files.names import (
    ADAPTER_FILE,
    BASE_FOLDER,
    CONFIG_FILE,
    SEAL,
    TRAINER_STATE_FILE,
    UNFINISHED_FILE,
)
from hf_compressm.files.weights import adapter_folders, read_header, read_headers


logger = logging.get_logger(__name__)

SETTLED_NANOSECONDS = 20_000_000
"""A file that changed less than this before it was read may change again without a later time stamp."""


def read_saved(directory: str | Path) -> SavedModel:
    """Read a checkpoint or saved model, and make sure that every file in it is whole.

    Reading the same directory twice in a row costs nothing the second time, as long as none of its files has changed:
    a run that looks for its last whole checkpoint and resumes from it reads and checksums it once.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    directory = Path(directory)
    wait_for_seal(directory)
    if (known := _LAST.of(directory)) is not None:
        return known
    since, stamps = time.time_ns(), _stamps(directory)
    saved = _read(directory)
    _LAST.keep(saved, stamps, since)
    return saved


def verify_checkpoint(directory: str | Path) -> None:
    """Make sure that a checkpoint or saved model is whole and that sizes in configuration and tensors agree.

    Args:
        directory: with `config.json` and safetensors weights, as the Trainer or `save_pretrained` writes it.

    Raises:
        ValueError: naming the file, and what is wrong with it.
    """
    read_saved(directory).verify()


def find_last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint from which a run can resume, whatever happened to it.

    Unlike transformers' `get_last_checkpoint`, which takes the largest step number, it passes over checkpoints that
    a crash, a full disk or a damaged file left incomplete, and logs why.

    Args:
        output_dir: the run's `TrainingArguments.output_dir`.

    Returns:
        Path of a `checkpoint-<step>` directory, for `trainer.train(resume_from_checkpoint=...)`; None if there is
        none, so that training starts from the beginning.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [(int(path.name[11:]), path) for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    for _, path in sorted(numbered, reverse=True):
        try:
            if read_saved(path).trainer_state is None:
                raise ValueError(f"{path / TRAINER_STATE_FILE} is missing.")
        except ValueError as error:
            logger.warning(f"{path.name} is passed over: {error}")
        else:
            return str(path)
    return None


@dataclass
class _LastRead:
    """The directory that was read last, valid while the time stamps of its files stay the same."""

    saved: SavedModel | None = None
    stamps: dict[Path, tuple[int, ...]] = field(default_factory=dict)

    def of(self, directory: Path) -> SavedModel | None:
        known = self.saved is not None and self.saved.directory == directory
        return self.saved if known and self.stamps == _stamps(directory) else None

    def keep(self, saved: SavedModel, stamps: dict[Path, tuple[int, ...]], since: int) -> None:
        settled = all(since - max(times) > SETTLED_NANOSECONDS for _, _, *times in stamps.values())
        self.saved, self.stamps = (saved, stamps) if settled else (None, {})


_LAST = _LastRead()


def _stamps(directory: Path) -> dict[Path, tuple[int, ...]]:
    """Inode, length and times of every file below a directory."""
    found: dict[Path, tuple[int, ...]] = {}
    for path in sorted(directory.rglob("*")):
        try:
            of_file = path.stat()
        except OSError:  # a link that leads nowhere, or a file that another process has just removed
            continue
        if S_ISREG(of_file.st_mode):
            found[path] = (of_file.st_ino, of_file.st_size, of_file.st_mtime_ns, of_file.st_ctime_ns)
    return found


def _read(directory: Path) -> SavedModel:
    """Read a directory, even if it was read before."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory.")
    if (directory / UNFINISHED_FILE).exists():
        raise ValueError(f"{directory} was interrupted while it was written ({UNFINISHED_FILE} exists).")
    is_sealed = (directory / SEAL).exists()
    if is_sealed:
        compare_with_seal(directory)
    values, state = (_json_if_there(directory / name) for name in (CONFIG_FILE, TRAINER_STATE_FILE))
    adapters = adapter_folders(directory, ADAPTER_FILE)
    for folder in adapters:
        read_header(folder / ADAPTER_FILE)
    base = _read(directory / BASE_FOLDER) if (directory / BASE_FOLDER).is_dir() else None
    headers = {} if adapters else read_headers(directory)
    if not is_sealed:
        for path in sorted([*directory.glob("*.pt"), *directory.glob("*.pth")]):
            _check_archive(path)
    return SavedModel(directory, values, state, headers, base, is_sealed)


def _json_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _check_archive(path: Path) -> None:
    """Raise `ValueError` unless a file of `torch.save` is a whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken: Any = archive.testzip()
    except Exception as error:  # a flipped bit may announce a password, a compression, or a wrong length
        raise ValueError(f"{path} is not whole: {error}.") from error
    if broken is not None:
        raise ValueError(f"{path} is damaged in {broken}.")
