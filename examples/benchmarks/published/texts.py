"""The texts of `published_table.py` as tokens: windows to test on, calibration batches, rows to train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor


WIKITEXT, TEST_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
TEST_SHARE = 0.1
"""Of a local file, from its end."""


@dataclass(frozen=True)
class Texts:
    """A text to calibrate and train on, and one to test on."""

    train: str
    test: str


def wikitext(train_config: str = TEST_CONFIG, train_split: str = "train") -> Texts:
    """WikiText from the Hub: all lines of a split joined by two line breaks, empty ones too.

    Args:
        train_config: `wikitext-2-raw-v1`, or `wikitext-103-raw-v1`, whose training split holds that of the former.
        train_split: in the notation of `datasets`, such as `train[:5%]`.
    """
    train = datasets.load_dataset(WIKITEXT, train_config, split=train_split)
    test = datasets.load_dataset(WIKITEXT, TEST_CONFIG, split="test")
    return Texts("\n\n".join(train["text"]), "\n\n".join(test["text"]))


def local(path: Path) -> Texts:
    """A folder with `train.txt` and `test.txt`, or a file whose last tenth is the test.

    Raises:
        ValueError: if neither is there.
    """
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        split = round(len(text) * (1 - TEST_SHARE))
        return Texts(text[:split], text[split:])
    files = [path / name for name in ("train.txt", "test.txt")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"--text wants a file, or a folder with train.txt and test.txt; {', '.join(missing)} is missing."
        )
    return Texts(*(file.read_text(encoding="utf-8") for file in files))


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """All tokens of a text, `(tokens,)`, as one sequence."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def windows(tokens: Tensor, length: int) -> Tensor:
    """A text in windows that do not overlap, `(windows, length)`; what is left at the end is dropped.

    Raises:
        ValueError: for a text that is shorter than one window.
    """
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"A text of {len(tokens)} tokens has no window of {length}. Take a longer one, or a lower --length."
        )
    return tokens[: count * length].view(count, length)


def calibration(tokens: Tensor, samples: int, length: int, batch_size: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of windows that begin anywhere in a text.

    Raises:
        ValueError: for a text that is shorter than one window.
    """
    places = len(windows(tokens, length)) and len(tokens) - length + 1
    starts = torch.randint(places, (samples,), generator=torch.Generator().manual_seed(seed))
    rows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
    return [{"input_ids": part} for part in rows.split(batch_size)]
