"""The content of safetensors weights, in one file or in shards: headers, and tensors one by one on request."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_compressm.files.atomic import read_json
from hf_compressm.files.names import KEPT_PREFIX
from hf_compressm.utils.checks import quoted


_OF_A_RUN = re.compile(rf"({KEPT_PREFIX})?checkpoint-\d+$|\.")


class TensorHeader(NamedTuple):
    """One tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it, such as "F32"
    file: Path


Headers = Mapping[str, TensorHeader]
"""Headers by the names of the tensors."""


def has_weights(directory: str | Path) -> bool:
    """Whether a directory has safetensors weights, in one file or in shards."""
    return any((Path(directory) / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def read_headers(directory: str | Path) -> dict[str, TensorHeader]:
    """Read the header of every weights file of a directory, each once.

    Raises:
        ValueError: naming the file, if weights are missing, an index names a missing shard or a tensor that its
            shard lacks, or a file is not whole.
    """
    directory = Path(directory)
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise ValueError(f"{directory} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    placed = _placed_tensors(index)
    headers: dict[str, TensorHeader] = {}
    for shard in sorted(set(placed.values())):
        found = read_header(directory / shard)
        absent = [name for name, place in placed.items() if place == shard and name not in found]
        if absent:
            raise ValueError(f"{directory / shard} lacks {quoted(absent[0])}, which {index.name} says is in it.")
        headers |= found
    return headers


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one safetensors file.

    Raises:
        ValueError: naming the file, if it is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorHeader(tuple(s.get_shape()), s.get_dtype(), path) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from error


def read_tensors(headers: Headers, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one by one, file by file.

    Args:
        headers: from `read_headers`.
        names: names of the wanted tensors; all of them by default.
    """
    wanted = list(headers if names is None else names)
    for path in sorted({headers[name].file for name in wanted}):
        with safe_open(path, framework="pt") as file:
            for name in wanted:
                if headers[name].file == path:
                    yield name, file.get_tensor(name)


def adapter_folders(directory: Path, name: str) -> list[Path]:
    """A directory and the folders in it that hold an adapter's file, as PEFT saves `default` and adapters with names.

    The checkpoints of a run are not its adapters, and neither are hidden folders.

    Args:
        directory: of a PEFT model.
        name: of the file, `adapter_config.json` or the weights.
    """
    folders = [path.parent for path in sorted(directory.glob(f"*/{name}")) if not _OF_A_RUN.match(path.parent.name)]
    return [directory, *folders] if (directory / name).exists() else folders


def is_file(path: Path) -> bool:
    """Whether a file exists; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _placed_tensors(index: Path) -> dict[str, str]:
    """The shard of every tensor; each shard is checked to be a file beside the index."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index} has no weight_map that names a shard for each tensor.")
    for name in sorted(set(placed.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {quoted(name)}, which is not a file beside it.")
        if not is_file(index.parent / name):
            raise ValueError(f"{index} names {quoted(name)}, which is missing.")
    return placed
