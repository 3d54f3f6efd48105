"""Labelled sequences of numbers: MNIST's own files, or images and series on the Hub."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_compressm.data.hub import check_column, load_hub_dataset
from hf_compressm.data.sources import SequenceSource


Split = tuple[np.ndarray, np.ndarray]
"""Sequences `(examples, length, features)`, labels `(examples,)`."""


def read_sequences(source: SequenceSource) -> list[Split]:
    """The training split and, if there is one, the test split; nothing if no source is given.

    Raises:
        ValueError: for two sources at once, or one that cannot be read.
    """
    if source.mnist_dir and source.dataset_name:
        raise ValueError("Give mnist_dir or dataset_name, not both.")
    if source.mnist_dir:
        return [_read_mnist(Path(source.mnist_dir), name) for name in ("train", "t10k")]
    if not source.dataset_name:
        return []
    splits = load_hub_dataset(source.dataset_name, source.dataset_config_name)
    for column in (source.input_column, source.label_column):
        check_column(source.dataset_name, splits, column)
    names = ["train", *[name for name in ("test", "validation") if name in splits][:1]]
    columns = [(splits[name][source.input_column], splits[name][source.label_column]) for name in names]
    return [(to_sequences(inputs), np.asarray(labels)) for inputs, labels in columns]


def to_sequences(inputs: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Sequences from series `(length,)` or images `(height, width)` or `(height, width, channels)`, bytes as [0, 1].

    Raises:
        ValueError: if they differ in shape.
    """
    arrays = [np.asarray(item) for item in inputs]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"Sequences differ in shape: {sorted(shapes)[:3]} ...; one shape is needed.")
    stacked = np.stack(arrays)
    scale = 255 if stacked.dtype == np.uint8 else 1
    channels = stacked.shape[3] if stacked.ndim == 4 else 1
    return stacked.reshape(len(stacked), -1, channels).astype(np.float32) / scale


def _read_mnist(folder: Path, name: str) -> Split:
    images, labels = (_read_idx(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return to_sequences(images), labels


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """Read one of MNIST's idx files, plain or gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            dimensions = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0
            shape = np.frombuffer(content, ">u4", dimensions, offset=4) if dimensions else ()
            if not dimensions or len(content) != 4 + 4 * dimensions + int(np.prod(shape)):
                raise ValueError(f"{path} is not an idx file of bytes, or is cut short.")
            return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    raise ValueError(f"There is neither {folder / name} nor {name}.gz; mnist_dir must hold MNIST's four idx files.")
