"""Train or fine-tune a causal language model and compress its state on the way.

The default is a small byte-level Mamba on the source text of Python's standard library; nothing is downloaded.
`--help` lists every option; a YAML or JSON file can replace them: `run_clm.py configs/clm.yaml`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from shared import Accuracy, Experiment, RunArguments, load_pretrained, parse_arguments, run
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

from hf_compressm import CompreSSMConfig, enable_fast_selective_scan
from hf_compressm.data import ByteTokenizer, TextSource, read_texts, split_into_blocks


BYTES = ByteTokenizer.vocab_size


@dataclass
class ModelArguments:
    """The model: a new byte-level Mamba, or one from the Hub or a directory."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local directory to start from."})
    hidden_size: int = field(default=128, metadata={"help": "Features between the layers of a new model."})
    state_size: int = field(default=64, metadata={"help": "States per channel of a new model."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers of a new model."})


@dataclass
class DataArguments(TextSource):
    """The text: Python's standard library unless another source is given."""

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
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate, in addition to every cut."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between evaluations."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints; the end is always saved."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    report_to: str | None = field(default="none", metadata={"help": "Tracker: tensorboard, trackio, wandb, ..."})


def make_blocks(args: DataArguments, tokenize: Callable) -> tuple[Dataset, Dataset]:
    """Training and validation blocks of `block_size` tokens; validation is the end of the text."""
    if not 0 < args.validation_share < 1:
        raise ValueError(f"validation_share must lie between 0 and 1, got {args.validation_share}.")

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        blocks = split_into_blocks(batch["input_ids"], args.block_size)
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
    """A new or a pretrained model and its tokenizer; that of bytes if it has none."""
    if not args.model_name_or_path:
        sizes = {name: getattr(args, name) for name in ("hidden_size", "state_size", "num_hidden_layers")}
        return MambaForCausalLM(MambaConfig(vocab_size=BYTES, **sizes)), ByteTokenizer()
    model = load_pretrained(AutoModelForCausalLM, args.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    except (OSError, ValueError):
        tokenizer = None
    # For a directory without tokenizer files, some families return a tokenizer that knows no word.
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
    kinds = (ModelArguments, DataArguments, RunArguments, CompreSSMConfig, ClmTrainingArguments)
    model_args, data_args, run_args, compressm_config, training_args = parse_arguments(kinds, arguments)
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
        settings=compressm_config,
        run=run_args,
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
        print(f"\nNext: look at {folder}/report.html; cut more with --tolerance 0.2; train longer with --max_steps.")
    return experiment.final


def _first(logits: torch.Tensor | tuple) -> torch.Tensor:
    """The logits alone; models with a cache return it after them."""
    return logits[0] if isinstance(logits, tuple) else logits


if __name__ == "__main__":
    run(main)
