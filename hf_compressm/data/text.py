"""Text: local files, data sets on the Hub, or the source of Python's standard library."""

import sysconfig
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_compressm.data.hub import check_column, load_hub_dataset
from hf_compressm.data.sources import TextSource
from hf_compressm.utils.text import decoded


class ByteTokenizer:
    """A tokenizer for models of bytes: one token per byte of UTF-8."""

    vocab_size = 256

    def __call__(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """Bytes of each text."""
        return {"input_ids": [list(text.encode("utf-8")) for text in texts]}

    def decode(self, tokens: Tensor) -> str:
        """The text; bytes that are not UTF-8 become replacement characters."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def read_texts(source: TextSource) -> list[str]:
    """The documents, cut off after `max_characters`.

    Raises:
        ValueError: for two sources at once, a file that is missing or not text in UTF-8, or a data set that cannot be
            loaded.
    """
    texts, left = [], source.max_characters
    for document in _documents(source):
        texts.append(document[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts


def split_into_blocks(documents: Sequence[Sequence[int]], block_size: int) -> list[list[int]]:
    """Tokens of all documents, one after the other, in blocks of one length; what is left over is dropped.

    Raises:
        ValueError: if `block_size` is below 2.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, got {block_size}.")
    tokens = list(chain.from_iterable(documents))
    return [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]


def _documents(source: TextSource) -> Iterator[str]:
    if source.train_file and source.dataset_name:
        raise ValueError("Give train_file or dataset_name, not both.")
    if source.dataset_name:
        splits = load_hub_dataset(source.dataset_name, source.dataset_config_name)
        check_column(source.dataset_name, splits, source.text_column)
        return (row[source.text_column] for row in splits["train"])
    if source.train_file:
        given: Any = source.train_file
        names = [given] if isinstance(given, str) else given  # a YAML file may give one name
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            raise ValueError(f"There is no file {', '.join(missing)}; train_file takes local text files.")
        return (decoded(Path(name).read_bytes(), name) for name in names)
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return (path.read_text(encoding="utf-8", errors="replace") for path in paths)
