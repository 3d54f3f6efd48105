"""Train a sequence classifier and compress its state on the way.

The default is S5 on scikit-learn's handwritten digits, read pixel by pixel; nothing is downloaded. `--help` lists
every option; a YAML or JSON file can replace them: `run_sequence_classification.py configs/smnist_lru.yaml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Array2D, ClassLabel, Dataset, Features
from shared import Accuracy, Experiment, RunArguments, load_pretrained, parse_arguments, run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hf_compressm import CompreSSMConfig, enable_fast_selective_scan
from hf_compressm.data.sequences import SequenceSource, Split, read_sequences, to_sequences


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
    config_overrides: str | None = field(
        default=None, metadata={"help": "Other fields of a new model's config: activation=full_glu,clip_eigs=true."}
    )


@dataclass
class DataArguments(SequenceSource):
    """The data: scikit-learn's digits unless another source is given."""

    test_size: float = field(default=0.2, metadata={"help": "Share held out if the data have no test split."})
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
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate, in addition to every cut."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints; the end is always saved."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    report_to: str | None = field(default="none", metadata={"help": "Tracker: tensorboard, trackio, wandb, ..."})


def load_data(args: DataArguments) -> tuple[Split, Split]:
    """Training and test split."""
    splits = read_sequences(args)
    if len(splits) == 2:
        return splits[0], splits[1]
    if splits:
        sequences, labels = splits[0]
    else:
        digits = load_digits()
        sequences, labels = to_sequences(digits.images / digits.images.max()), digits.target
    if not 0 < args.test_size < 1:
        raise ValueError(f"test_size must lie between 0 and 1, got {args.test_size}.")
    split = train_test_split(sequences, labels, test_size=args.test_size, random_state=0, stratify=labels)
    return (split[0], split[2]), (split[1], split[3])


def to_dataset(split: Split, num_labels: int, limit: int | None) -> Dataset:
    """A `datasets.Dataset` with the inputs that the models read."""
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
    if args.config_overrides:
        try:
            config.update_from_string(args.config_overrides)
            config = type(config)(**config.to_dict())  # checks the fields together
        except ValueError as error:
            text = "config_overrides must be fields of the config, as in activation=full_glu,clip_eigs=true"
            raise ValueError(f"{text}, got {args.config_overrides!r}: {error}.") from error
    return AutoModelForSequenceClassification.from_config(config)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, cut, report, save, reload; returns the final metrics."""
    kinds = (ModelArguments, DataArguments, RunArguments, CompreSSMConfig, DigitsTrainingArguments)
    model_args, data_args, run_args, compressm_config, training_args = parse_arguments(kinds, arguments)
    set_seed(training_args.seed)
    enable_fast_selective_scan()
    train, test = load_data(data_args)
    num_labels = int(max(train[1].max(), test[1].max())) + 1
    model = make_model(model_args, train[0].shape[2], num_labels)
    test_set = to_dataset(test, num_labels, data_args.max_eval_samples)
    accuracy = Accuracy()
    experiment = Experiment(
        tokens_per_example=train[0].shape[1],
        settings=compressm_config,
        run=run_args,
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
        print(f"Next: look at {folder}/report.html; cut more with --tolerance 0.2; try --model_type lru.")
    return experiment.final


if __name__ == "__main__":
    run(main)
