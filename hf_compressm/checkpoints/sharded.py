"""Reading a directory of `torch.distributed.checkpoint` in one process, without running what may be pickled in it.

torch describes such a directory in a pickle, `.metadata`, and keeps plain values in files of `torch.save`. Both are
checked before torch reads them: an object that a checkpoint does not need is refused, and never made.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from hf_compressm.utils.checks import quoted


_PATHS = ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_DESCRIPTIONS = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorProperties._MEM_FORMAT_ENCODING",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_HARMLESS = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
        *(("torch.distributed.checkpoint.metadata", name) for name in _DESCRIPTIONS),
    }
)
"""All names in the metadata of such a directory, besides the dtypes of torch."""


def read_sharded(path: Path) -> dict[str, Any]:
    """The whole tensors and the plain values of a directory, by the keys under which they were saved.

    Raises:
        ValueError: if the metadata names anything but parts of a checkpoint, or a file outside the directory.
        Exception: whatever torch raises for a damaged directory.
    """
    metadata = _Unpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"its metadata names {quoted(info.relative_path)}, which is not a file in it")
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=_Planner(), no_dist=True)
    return state


class _Unpickler(pickle.Unpickler):
    """An unpickler that makes only the objects that the metadata of a checkpoint needs."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name, if it is one of those."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _HARMLESS:
            raise ValueError(f"its metadata asks for {quoted(f'{module}.{name}')}, which no checkpoint needs")
        return super().find_class(module, name)


class _Planner(_EmptyStateDictLoadPlanner):
    """A load planner that refuses values that are not plain."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Read the value in the mode that runs no code, before the planner reads it in its own way."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
