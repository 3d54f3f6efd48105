"""Train or fine-tune a causal language model and compress its state on the way.

By default a small byte-level Mamba on the source text of Python's standard library; nothing is downloaded. `--help`
lists every option, and a YAML or JSON file may stand in their place: `run_clm.py configs/clm.yaml`.
"""

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from shared import Accuracy, Experiment, load_hub_dataset, load_pretrained, parse_arguments, run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_compressm import CompreSSMCallback, CompreSSMConfig, enable_fast_selective_scan


BYTES = 256


@dataclass
class ModelArguments:
    """The model: a new byte-level Mamba, or one from the Hub or a directory."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local directory to start from."})
    hidden_size: int = field(default=128, metadata={"help": "Features between the layers of a new model."})
    state_size: int = field(default=64, metadata={"help": "States per channel of a new model."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of a new model."})


@dataclass
class DataArguments:
    """The text: Python's standard library unless one of these is given."""

    train_file: list[str] | None = field(default=None, metadata={"help": "Local text file or files."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, with a train split."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "Its column of text."})
    block_size: int = field(default=256, metadata={"help": "Tokens per training example."})
    max_characters: int = field(default=2_000_000, metadata={"help": "Use no more text than this."})
    validation_share: float = field(default=0.05, metadata={"help": "Share at the end of the text that is held out."})
    max_eval_blocks: int = field(default=64, metadata={"help": "Evaluate on no more blocks than this."})
    prompt: str = field(default="def ", metadata={"help": "Text that the reloaded model continues."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens that it generates."})


@dataclass
class ClmTrainingArguments(TrainingArguments):
    """Every option of `TrainingArguments`, with defaults that suit the small model."""

    output_dir: str | None = field(default="runs/clm", metadata={"help": "Where model and plots are written."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps; -1 for num_train_epochs to decide."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks per step and device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Blocks per evaluation batch."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or a share of all below 1."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate, beside every cut."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between evaluations."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints; the end is always saved."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    report_to: str | None = field(default="none", metadata={"help": "Tracker: tensorboard, trackio, wandb, ..."})


class ByteTokenizer:
    """One token per byte of UTF-8; enough of a tokenizer for this script."""

    def __call__(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """Bytes of each text."""
        return {"input_ids": [list(text.encode("utf-8")) for text in texts]}

    def decode(self, tokens: torch.Tensor) -> str:
        """The text; bytes that are no UTF-8 become replacement characters."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def read_texts(args: DataArguments) -> list[str]:
    """The documents, cut off after `max_characters`."""
    if args.train_file and args.dataset_name:
        raise ValueError("Give train_file or dataset_name, not both.")
    if args.dataset_name:
        train = load_hub_dataset(args.dataset_name, args.dataset_config_name)["train"]
        if args.text_column not in train.column_names:
            raise ValueError(f"{args.dataset_name} has no column {args.text_column!r}, only {train.column_names}.")
        documents = (row[args.text_column] for row in train)
    elif args.train_file:
        names = [args.train_file] if isinstance(args.train_file, str) else args.train_file
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            raise ValueError(f"There is no file {', '.join(missing)}; train_file takes local text files.")
        documents = (Path(name).read_text(encoding="utf-8", errors="replace") for name in names)
    else:
        library = Path(sysconfig.get_paths()["stdlib"])
        documents = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py")))
    texts, left = [], args.max_characters
    for document in documents:
        texts.append(document[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts


def make_blocks(args: DataArguments, tokenize: Callable) -> tuple[Dataset, Dataset]:
    """Training and validation blocks of `block_size` tokens; validation is the end of the text."""
    if args.block_size < 2 or not 0 < args.validation_share < 1:
        raise ValueError(
            f"block_size must be at least 2 and validation_share between 0 and 1, got {args.block_size} and "
            f"{args.validation_share}."
        )

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = list(chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(tokens) - args.block_size + 1, args.block_size)
        blocks = [tokens[start : start + args.block_size] for start in starts]
        return {"input_ids": blocks, "labels": blocks}

    texts = Dataset.from_dict({"text": read_texts(args)})
    tokens = texts.map(lambda batch: {"input_ids": tokenize(batch["text"])["input_ids"]}, batched=True)
    blocks = tokens.map(group, batched=True, remove_columns=tokens.column_names)
    if len(blocks) < 2:
        count = sum(map(len, tokens["input_ids"]))
        raise ValueError(
            f"The text has {count} tokens: too few for a training and a validation block of block_size="
            f"{args.block_size}. Give more text, or a block_size of at most {max(count // 2, 2)}."
        )
    held_out = min(max(round(len(blocks) * args.validation_share), 1), len(blocks) - 1)
    first = len(blocks) - held_out
    return blocks.select(range(first)), blocks.select(range(first, min(first + args.max_eval_blocks, len(blocks))))


def make_model(args: ModelArguments) -> tuple[PreTrainedModel, ByteTokenizer | AutoTokenizer]:
    """A new or a pretrained model and its tokenizer; bytes where it has none."""
    if not args.model_name_or_path:
        sizes = {name: getattr(args, name) for name in ("hidden_size", "state_size", "num_hidden_layers")}
        return MambaForCausalLM(MambaConfig(vocab_size=BYTES, **sizes)), ByteTokenizer()
    model = load_pretrained(AutoModelForCausalLM, args.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    except (OSError, ValueError):
        tokenizer = None
    # Where a directory has no tokenizer files, some families answer with a tokenizer that knows no word.
    if tokenizer is not None and tokenizer("text", add_special_tokens=False)["input_ids"]:
        return model, tokenizer
    if model.config.vocab_size != BYTES:
        raise ValueError(
            f"{args.model_name_or_path} has no tokenizer that can be loaded, and its vocabulary of "
            f"{model.config.vocab_size} is not that of bytes ({BYTES})."
        )
    return model, ByteTokenizer()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, cut, report, save, reload; returns the final metrics."""
    kinds = (ModelArguments, DataArguments, CompreSSMConfig, ClmTrainingArguments)
    model_args, data_args, compressm_config, training_args = parse_arguments(kinds, arguments)
    set_seed(training_args.seed)
    enable_fast_selective_scan()
    model, tokenizer = make_model(model_args)
    train, validation = make_blocks(data_args, tokenizer)
    accuracy = Accuracy()

    def next_token_accuracy(seen) -> dict[str, float]:
        predictions, references = seen.predictions[:, :-1].ravel(), np.asarray(seen.label_ids)[:, 1:].ravel()
        return accuracy.compute(predictions=predictions, references=references)

    experiment = Experiment(
        tokens_per_example=data_args.block_size,
        compressm=CompreSSMCallback(compressm_config),
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        processing_class=None if isinstance(tokenizer, ByteTokenizer) else tokenizer,
        compute_metrics=next_token_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: _first(logits).argmax(-1),
    )
    experiment.train_and_report()
    if training_args.process_index == 0:
        folder = training_args.output_dir
        reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        prompt = torch.tensor(tokenizer([data_args.prompt])["input_ids"])
        output = reloaded.generate(prompt, max_new_tokens=data_args.max_new_tokens, do_sample=False)
        print(f"\nReloaded from {folder} with plain transformers; it continues {data_args.prompt!r}:")
        print(tokenizer.decode(output[0]))
        print(f"\nNext: look at {folder}/spectra.png; cut more with --tolerance 0.2; train longer with --max_steps.")
    return experiment.final


def _first(logits: torch.Tensor | tuple) -> torch.Tensor:
    """Models with a cache return it behind the logits."""
    return logits[0] if isinstance(logits, tuple) else logits


if __name__ == "__main__":
    run(main)
