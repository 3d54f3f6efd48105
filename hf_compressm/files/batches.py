"""Batches of model inputs on the disk: tensors in a safetensors file, their places in dicts in its header."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from transformers import BatchEncoding


STRUCTURE = "batches"
"""The entry of the header that describes the structure."""


class UnsavableBatchError(TypeError):
    """A batch that holds something besides tensors, plain values, lists and dicts."""


def write_batches(path: Path, batches: list[Any]) -> None:
    """Write batches: tensors, numbers, texts and None, in lists, tuples and dicts of any depth.

    Args:
        path: a file that is written anew.
        batches: the batches.

    Raises:
        UnsavableBatchError: naming what cannot be written; there is then no file.
    """
    tensors: dict[int, tuple[str, Tensor]] = {}
    metadata = {STRUCTURE: json.dumps(encoded(batches, tensors))}
    save_file({name: _copied(value) for name, value in tensors.values()}, path, metadata=metadata)


def read_batches(path: Path, device: torch.device) -> list[Any]:
    """Read the batches that `write_batches` wrote.

    Args:
        path: the file.
        device: where tensors go; those that were on the CPU stay there.

    Raises:
        ValueError: naming the file, if it is not of that form.
    """
    try:
        with safe_open(path, "pt", device="cpu") as file:
            structure = json.loads(file.metadata()[STRUCTURE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return decoded(structure, tensors, device)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as batches: {type(error).__name__}: {error}") from error


def _copied(value: Tensor) -> Tensor:
    """A copy on the CPU, since safetensors refuses tensors that share memory and does not see conjugate views."""
    return value.resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)


@lru_cache
def _has_form(dtype: torch.dtype) -> bool:
    """Whether safetensors has a form for a dtype."""
    try:
        save({"x": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


def encoded(value: Any, tensors: dict[int, tuple[str, Tensor]]) -> Any:
    """A value as JSON, `[kind, content]`, with its tensors in a table: names and tensors by their `id`.

    Raises:
        UnsavableBatchError: naming what has no such form.
    """
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.layout != torch.strided or not _has_form(value.dtype):
            raise UnsavableBatchError(f"a {type(value).__name__} of {value.dtype} in them has no form in a file")
        name, _ = tensors.setdefault(id(value), (str(len(tensors)), value.detach()))
        return ["tensor", name, value.device.type != "cpu"]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    if isinstance(value, Mapping):
        kind = "encoding" if isinstance(value, BatchEncoding) else "dict"
        if not all(isinstance(key, str) for key in value):
            raise UnsavableBatchError(f"a {type(value).__name__} in them has keys that are not texts")
        return [kind, [[key, encoded(part, tensors)] for key, part in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [encoded(part, tensors) for part in value]]
    raise UnsavableBatchError(f"they hold a {type(value).__name__}, which is no tensor, number or text")


def decoded(structure: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The inverse of `encoded`, with the tensors by name; those that were not on the CPU go to a device."""
    kind, content = structure[0], structure[1]
    if kind == "tensor":
        return tensors[content].to(device) if structure[2] else tensors[content]
    if kind == "value":
        return content
    if kind in ("list", "tuple"):
        parts = [decoded(part, tensors, device) for part in content]
        return parts if kind == "list" else tuple(parts)
    items = {key: decoded(part, tensors, device) for key, part in content}
    return BatchEncoding(items) if kind == "encoding" else items
