"""Whole checkpoints: sealing them, telling them from torn ones, and finding the last.

A Trainer writes weights, optimizer, scheduler, generator states and, last, its own state, one file after the other
into the final directory, so that a crash leaves a directory that looks like a checkpoint. A seal, written last, lists
every file with its length and checksum. A checkpoint without one (the crash came between the Trainer's last file and
the seal, or the run had no callback) counts if all its files read whole.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_compressm.durable import quoted, read_json, sync_and_sum, sync_directory, write_json


logger = logging.get_logger(__name__)

SEAL = "compressm.complete"
SEAL_VERSION = 1
HISTORY_FILE = "compressm_history.json"
TRAINER_STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_model.safetensors"
BASE_FOLDER = "base_model"
"""Beside the adapters of a PEFT model, the base that they were trained on, where a cut has changed it."""
UNFINISHED_FILE = "checkpoint-is-incomplete.txt"
"""What transformers' just-in-time checkpoint leaves where it was interrupted."""


def seal_checkpoint(directory: str | Path) -> None:
    """Flush all files of a checkpoint to the disk and, when they are there, say so in `compressm.complete`.

    Args:
        directory: a checkpoint to which nothing more will be written.

    Raises:
        OSError: from the file system; there is then no seal.
    """
    directory = Path(directory)
    files = {path.relative_to(directory).as_posix(): sync_and_sum(path) for path in _files(directory)}
    for folder in {(directory / name).parent for name in files} | {directory}:
        sync_directory(folder)
    write_json(directory / SEAL, {"schema_version": SEAL_VERSION, "files": files})


def unseal_checkpoint(directory: str | Path) -> None:
    """Make a checkpoint that is about to be written over count no longer, until it is whole again.

    Its sealed files are removed, not written into: a copy by hard links keeps them. So is the Trainer's state, which
    is written last: without it the checkpoint is not complete, and old files and new ones do not pass for one.

    Args:
        directory: of a checkpoint; it need not be there.

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
    for path in list(_files(directory)):
        if path.relative_to(directory).as_posix() in sealed:
            path.unlink()


def find_last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run from which training can go on, whatever happened to the run.

    Unlike transformers' `get_last_checkpoint`, which takes the largest step number, it passes over checkpoints that
    were torn by a crash, a full disk or a damaged file, and logs why.

    Args:
        output_dir: the run's `TrainingArguments.output_dir`.

    Returns:
        Path of a `checkpoint-<step>` directory, for `trainer.train(resume_from_checkpoint=...)`; None if there is
        none to go on from, and training starts from the beginning.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [(int(path.name[11:]), path) for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    for _, path in sorted(numbered, reverse=True):
        try:
            verify_files(path)
            read_json(path / TRAINER_STATE_FILE)
        except ValueError as error:
            logger.warning(f"{path.name} is passed over: {error}")
        else:
            return str(path)
    return None


def verify_files(directory: str | Path) -> None:
    """Make sure that every file of a checkpoint or saved model is there and whole.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory.")
    if (directory / UNFINISHED_FILE).exists():
        raise ValueError(f"{directory} was interrupted while it was written ({UNFINISHED_FILE} is there).")
    if (directory / SEAL).exists():
        _compare_with_seal(directory)
    for name in ("config.json", TRAINER_STATE_FILE):
        if (directory / name).exists():
            read_json(directory / name)
    adapters = [*directory.glob(ADAPTER_FILE), *directory.glob(f"*/{ADAPTER_FILE}")]  # "default", and those with names
    for path in adapters:
        _shapes_in(path)
    if (directory / BASE_FOLDER).is_dir():
        verify_files(directory / BASE_FOLDER)
    if not adapters:
        tensor_shapes(directory)
    if not (directory / SEAL).exists():
        for path in sorted([*directory.glob("*.pt"), *directory.glob("*.pth")]):
            _check_archive(path)


def tensor_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a directory's safetensors weights, of one file or of all shards.

    Raises:
        ValueError: naming the file, if weights are missing, an index names a shard that is not there or a tensor that
            is not in its shard, or a file is not whole.
    """
    directory = Path(directory)
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if single.exists():
        return _shapes_in(single)
    if not index.exists():
        raise ValueError(f"{directory} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    placed = _placed_tensors(index)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(placed.values())):
        found = _shapes_in(directory / shard)
        absent = [name for name, place in placed.items() if place == shard and name not in found]
        if absent:
            raise ValueError(f"{directory / shard} lacks {quoted(absent[0])}, which {index.name} says is in it.")
        shapes |= found
    return shapes


def saved_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor in a directory's safetensors weights, read one by one."""
    directory = Path(directory)
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME} if single.exists() else set(_placed_tensors(index).values())
    for path in sorted(directory / name for name in names):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in one safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from error


def _placed_tensors(index: Path) -> dict[str, str]:
    """Shard of every tensor, after making sure that each shard is a file beside the index."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index} has no weight_map that names a shard for each tensor.")
    for name in sorted(set(placed.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {quoted(name)}, which is not a file beside it.")
        if not _is_file(index.parent / name):
            raise ValueError(f"{index} names {quoted(name)}, which is missing.")
    return placed


def _compare_with_seal(directory: Path) -> None:
    """Raise `ValueError` unless every sealed file is as it was."""
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
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{directory / SEAL} lists {quoted(name)}, which is not a file of this checkpoint.")
        if not _is_file(path):
            raise ValueError(f"{path} is missing.")
        try:
            found = sync_and_sum(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
        if found != expected:
            wrong = (
                "length" if not isinstance(expected, dict) or found["bytes"] != expected.get("bytes") else "content"
            )
            raise ValueError(f"{path} is damaged: its {wrong} is not what was written.")


def _sealed_names(directory: Path) -> set[str]:
    """What a checkpoint's seal lists; nothing if it has none that can be read."""
    try:
        return set(read_json(directory / SEAL).get("files") or ())
    except (ValueError, TypeError):
        return set()


def _files(directory: Path) -> Iterator[Path]:
    """Every file below a directory but the seal, what an interrupted write left, and transformers' passing note."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (SEAL, UNFINISHED_FILE) and not path.name.startswith(f".{SEAL}"):
            yield path


def _is_file(path: Path) -> bool:
    """Whether it is there; a name that no file can have is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _check_archive(path: Path) -> None:
    """Raise `ValueError` unless a file of `torch.save` is a whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken: Any = archive.testzip()
    except Exception as error:  # a flipped bit may claim a password, a compression, or a length that there is not
        raise ValueError(f"{path} is not whole: {error}.") from error
    if broken is not None:
        raise ValueError(f"{path} is damaged in {broken}.")
