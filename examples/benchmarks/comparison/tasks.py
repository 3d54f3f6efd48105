"""The tasks of the comparison: data in three splits, and models of any state size for them.

The validation split gives the curves during training, and chose the learning rate in the settings; the test split
gives the figure at the end and chooses nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recall import IGNORED, recall_examples
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
)

from hf_compressm.data.sequences import SequenceSource, Split, read_sequences, to_sequences
from hf_compressm.data.text import TextSource, read_texts


CLASSES = 10
BYTES = 256
SPLIT_SEED = 0
"""Of the division into training, validation and test data, which is the same in every run."""


class Examples(Dataset):
    """Tensors with one row per example, as a map-style dataset of model-input dicts."""

    def __init__(self, columns: Mapping[str, Tensor], limit: int | None = None) -> None:
        """Take the first `limit` rows of every column."""
        self.columns = {name: column[:limit] for name, column in columns.items()}

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example."""
        return {name: column[index] for name, column in self.columns.items()}


@dataclass(frozen=True, eq=False)
class Task:
    """Data and models of one question.

    Attributes:
        name: in tables.
        train: examples to train on.
        validation: for the curves.
        test: for the figure at the end.
        model_fields: what the data say of a model's config, such as the number of classes.
        auto_class: the Auto class that makes and loads models.
        metric: `"accuracy"`, higher is better, or `"loss"`, lower is better.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    model_fields: Mapping[str, Any]
    auto_class: Any
    metric: str

    def build(self, model: Mapping[str, Any], sizes: Sequence[int] | None = None) -> PreTrainedModel:
        """A new model.

        Args:
            model: `type` of the model and fields of its config.
            sizes: one state size per layer; by default that of the config, or one for all.
        """
        settings = {**self.model_fields, **model}
        kind = settings.pop("type")
        if sizes is not None:
            settings["state_size"] = max(sizes)
            if len(set(sizes)) > 1:
                settings["per_layer_config"] = {str(i): {"state_size": size} for i, size in enumerate(sizes)}
        return self.auto_class.from_config(AutoConfig.for_model(kind, **settings))

    def load(self, folder: Path) -> PreTrainedModel:
        """A model that an earlier run has saved."""
        return self.auto_class.from_pretrained(folder)

    def metrics(self, seen: EvalPrediction) -> dict[str, float]:
        """Share of scored positions that are predicted; predictions of a language model are for the next token."""
        predictions, labels = np.asarray(seen.predictions), np.asarray(seen.label_ids)
        if labels.ndim == 2:
            predictions, labels = predictions[:, :-1], labels[:, 1:]
        scored = labels != IGNORED
        return {"accuracy": float(np.mean(predictions[scored] == labels[scored]))}


def most_likely(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """What the Trainer keeps of the logits; some models return more behind them."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def images(mnist_dir: str | None = None, validation: int = 6000, limit: int | None = None) -> Task:
    """Images read pixel by pixel: MNIST (784 steps), or scikit-learn's digits (64 steps) without a folder.

    Args:
        mnist_dir: folder with MNIST's idx files.
        validation: examples that are held out of the training data.
        limit: use no more examples than this in each split.
    """
    splits = read_sequences(SequenceSource(mnist_dir=mnist_dir)) if mnist_dir else _digits()
    (inputs, labels), test = splits
    order = np.random.default_rng(SPLIT_SEED).permutation(len(inputs))
    parts = [(inputs[rows], labels[rows]) for rows in (order[validation:], order[:validation])]
    train, held_out, tested = (Examples(_columns(part), limit) for part in (*parts, test))
    fields = {"input_size": inputs.shape[2], "num_labels": CLASSES}
    name = "sequential MNIST" if mnist_dir else "digits"
    return Task(name, train, held_out, tested, fields, AutoModelForSequenceClassification, "accuracy")


def recall(
    keys: int = 24, values: int = 16, shown: int = 48, fewest: int = 4, train: int = 48_000, held_out: int = 1000
) -> Task:
    """Associative recall, see `recall.py`.

    Args:
        keys: in the vocabulary.
        values: in the vocabulary.
        shown: pairs in each sequence.
        fewest: different keys in a sequence of the training data; the others have them all.
        train: sequences to train on.
        held_out: sequences for validation, and as many for the test.
    """
    shape = {"keys": keys, "values": values, "shown": shown}
    numbers = ((train, fewest), (held_out, keys), (held_out, keys))
    splits = [
        Examples(recall_examples(count, **shape, seed=seed, fewest=least))
        for seed, (count, least) in enumerate(numbers)
    ]
    return Task("recall", *splits, {"vocab_size": keys + values}, AutoModelForCausalLM, "accuracy")


def text(
    train_file: list[str] | None = None, length: int = 256, characters: int = 4_000_000, blocks: int = 200
) -> Task:
    """Bytes of text: Python's standard library unless files are given.

    Args:
        train_file: local text files.
        length: bytes per example.
        characters: use no more text than this.
        blocks: examples for validation and as many for the test, the last ones of the text.
    """
    source = TextSource(train_file=train_file, max_characters=characters)
    content = "\n".join(read_texts(source)).encode()
    count = len(content) // length
    if count <= 2 * blocks:
        raise ValueError(f"The text has {count} blocks of {length} bytes; more than {2 * blocks} are needed.")
    tokens = torch.tensor(list(content[: count * length])).view(count, length)
    parts = tokens[: -2 * blocks], tokens[-2 * blocks : -blocks], tokens[-blocks:]
    splits = [Examples({"input_ids": part, "labels": part}) for part in parts]
    return Task("text", *splits, {"vocab_size": BYTES}, AutoModelForCausalLM, "loss")


TASKS: dict[str, Callable[..., Task]] = {"images": images, "recall": recall, "text": text}


def make_task(settings: Mapping[str, Any]) -> Task:
    """The task that settings name under `kind`, with the other settings as arguments.

    Raises:
        ValueError: for an unknown kind or argument.
    """
    others = dict(settings)
    kind = others.pop("kind", None)
    if kind not in TASKS:
        raise ValueError(f"The kind of task must be one of {sorted(TASKS)}, got {kind!r}.")
    try:
        return TASKS[kind](**others)
    except TypeError as error:
        raise ValueError(f"The task {kind!r} does not take these settings: {error}.") from error


def _digits() -> tuple[Split, Split]:
    """Scikit-learn's digits, every fifth for the test."""
    digits = load_digits()
    sequences, test = to_sequences(digits.images / digits.images.max()), np.arange(len(digits.target)) % 5 == 0
    return (sequences[~test], digits.target[~test]), (sequences[test], digits.target[test])


def _columns(split: Split) -> dict[str, Tensor]:
    """What a classifier reads."""
    inputs, labels = split
    return {
        "input_values": torch.from_numpy(np.ascontiguousarray(inputs)),
        "labels": torch.from_numpy(labels.astype(np.int64)),
    }
