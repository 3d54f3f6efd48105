"""Train a sequence classifier and compress its state on the way.

By default S5 on scikit-learn's handwritten digits, read pixel by pixel; nothing is downloaded. `--help` lists every
option, and a YAML or JSON file may stand in their place: `run_sequence_classification.py configs/smnist_lru.yaml`.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, ClassLabel, Dataset, Features
from shared import Accuracy, Experiment, load_hub_dataset, load_pretrained, parse_arguments, run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hf_compressm import CompreSSMCallback, CompreSSMConfig, enable_fast_selective_scan


Split = tuple[np.ndarray, np.ndarray]  # sequences (examples, length, features), labels (examples,)


@dataclass
class ModelArguments:
    """The model: a new one of `model_type`, or one from the Hub or a directory."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local directory to start from."})
    model_type: str = field(default="s5", metadata={"help": "Family of a new model.", "choices": ["s5", "lru"]})
    hidden_size: int = field(default=64, metadata={"help": "Features between the layers of a new model."})
    state_size: int = field(default=64, metadata={"help": "States per layer of a new model."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of a new model."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of a new model."})
    norm: str = field(default="layer", metadata={"help": "Norm of a new model.", "choices": ["layer", "batch"]})
    dt_min: float = field(default=0.01, metadata={"help": "Smallest initial step size of a new S5 model."})


@dataclass
class DataArguments:
    """The data: scikit-learn's digits unless one of these is given."""

    mnist_dir: str | None = field(default=None, metadata={"help": "Directory with MNIST's idx files, gzipped or not."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, with a train split."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    input_column: str = field(default="image", metadata={"help": "Its column of images or numbers."})
    label_column: str = field(default="label", metadata={"help": "Its column of class indices."})
    test_size: float = field(default=0.2, metadata={"help": "Share held out where the data have no test split."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use no more training examples than this."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use no more test examples than this."})


@dataclass
class DigitsTrainingArguments(TrainingArguments):
    """Every option of `TrainingArguments`, with defaults that suit the digits."""

    output_dir: str | None = field(default="runs/digits", metadata={"help": "Where model and plots are written."})
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Examples per evaluation batch."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or a share of all below 1."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate, beside every cut."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints; the end is always saved."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    report_to: str | None = field(default="none", metadata={"help": "Tracker: tensorboard, trackio, wandb, ..."})


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read one of MNIST's idx files, plain or gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            dimensions = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0
            shape = np.frombuffer(content, ">u4", dimensions, offset=4) if dimensions else ()
            if not dimensions or len(content) != 4 + 4 * dimensions + int(np.prod(shape)):
                raise ValueError(f"{path} is no idx file of bytes, or is cut short.")
            return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    raise ValueError(f"There is neither {folder / name} nor {name}.gz; mnist_dir must hold MNIST's four idx files.")


def to_sequences(inputs: Sequence[Any]) -> np.ndarray:
    """Images or series `(length,)`, `(height, width)` or `(height, width, channels)`, row by row, bytes to [0, 1]."""
    arrays = [np.asarray(item) for item in inputs]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"Sequences differ in shape: {sorted(shapes)[:3]} ...; this script needs one shape.")
    stacked = np.stack(arrays)
    scale = 255 if stacked.dtype == np.uint8 else 1
    channels = stacked.shape[3] if stacked.ndim == 4 else 1
    return stacked.reshape(len(stacked), -1, channels).astype(np.float32) / scale


def load_data(args: DataArguments) -> tuple[Split, Split]:
    """Training and test split."""
    if args.mnist_dir and args.dataset_name:
        raise ValueError("Give mnist_dir or dataset_name, not both.")
    if args.mnist_dir:
        folder = Path(args.mnist_dir)
        parts = [
            [read_idx(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
            for name in ("train", "t10k")
        ]
        return tuple((to_sequences(images), labels) for images, labels in parts)
    if args.dataset_name:
        splits = load_hub_dataset(args.dataset_name, args.dataset_config_name)
        for column in (args.input_column, args.label_column):
            if column not in splits["train"].column_names:
                raise ValueError(f"{args.dataset_name} has no column {column!r}: {splits['train'].column_names}.")
        test = next((splits[name] for name in ("test", "validation") if name in splits), None)
        parts = [
            (to_sequences(part[args.input_column]), np.asarray(part[args.label_column]))
            for part in (splits["train"], test)
            if part is not None
        ]
        if len(parts) == 2:
            return parts[0], parts[1]
        sequences, labels = parts[0]
    else:
        digits = load_digits()
        sequences, labels = to_sequences(digits.images / digits.images.max()), digits.target
    if not 0 < args.test_size < 1:
        raise ValueError(f"test_size must lie between 0 and 1, got {args.test_size}.")
    split = train_test_split(sequences, labels, test_size=args.test_size, random_state=0, stratify=labels)
    return (split[0], split[2]), (split[1], split[3])


def to_dataset(split: Split, num_labels: int, limit: int | None) -> Dataset:
    """A `datasets.Dataset` with what the models read."""
    sequences, labels = (part[:limit] for part in split)
    features = {"input_values": Array2D(sequences.shape[1:], "float32"), "labels": ClassLabel(num_labels)}
    columns = {"input_values": list(sequences), "labels": labels.astype(np.int64)}
    return Dataset.from_dict(columns, features=Features(features)).with_format("torch")


def make_model(args: ModelArguments, input_size: int, num_labels: int) -> PreTrainedModel:
    """A new or a pretrained classifier."""
    if args.model_name_or_path:
        model = load_pretrained(AutoModelForSequenceClassification, args.model_name_or_path, num_labels=num_labels)
        if getattr(model.config, "input_size", None) != input_size:
            expected = getattr(model.config, "input_size", None)
            raise ValueError(f"{args.model_name_or_path} has input_size={expected}, but the data have {input_size}.")
        return model
    names = ("hidden_size", "state_size", "num_hidden_layers", "dropout", "norm")
    settings = {name: getattr(args, name) for name in names}
    if args.model_type == "s5":
        settings["dt_min"] = args.dt_min
    config = AutoConfig.for_model(args.model_type, input_size=input_size, num_labels=num_labels, **settings)
    return AutoModelForSequenceClassification.from_config(config)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, cut, report, save, reload; returns the final metrics."""
    kinds = (ModelArguments, DataArguments, CompreSSMConfig, DigitsTrainingArguments)
    model_args, data_args, compressm_config, training_args = parse_arguments(kinds, arguments)
    set_seed(training_args.seed)
    enable_fast_selective_scan()
    train, test = load_data(data_args)
    num_labels = int(max(train[1].max(), test[1].max())) + 1
    model = make_model(model_args, train[0].shape[2], num_labels)
    test_set = to_dataset(test, num_labels, data_args.max_eval_samples)
    accuracy = Accuracy()
    experiment = Experiment(
        tokens_per_example=train[0].shape[1],
        compressm=CompreSSMCallback(compressm_config),
        model=model,
        args=training_args,
        train_dataset=to_dataset(train, num_labels, data_args.max_train_samples),
        eval_dataset=test_set,
        compute_metrics=lambda seen: accuracy.compute(
            predictions=seen.predictions.argmax(-1), references=seen.label_ids
        ),
    )
    experiment.train_and_report()
    if training_args.process_index == 0:
        reloaded = AutoModelForSequenceClassification.from_pretrained(training_args.output_dir).eval()
        example = test_set[0]
        with torch.no_grad():
            predicted = int(reloaded(input_values=example["input_values"][None]).logits.argmax())
        folder = training_args.output_dir
        print(f"\nReloaded from {folder}: the first test example is a {int(example['labels'])}, read as {predicted}.")
        print(f"Next: look at {folder}/spectra.png; cut more with --tolerance 0.2; try --model_type lru.")
    return experiment.final


if __name__ == "__main__":
    run(main)
