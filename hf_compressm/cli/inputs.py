"""What the commands work on: the directory of a model, and calibration batches for it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from hf_compressm.checkpoints import read_saved, refuse_run_folder
from hf_compressm.config import CompreSSMConfig
from hf_compressm.data import ByteTokenizer, SequenceSource, TextSource, read_sequences, read_texts, split_into_blocks
from hf_compressm.scans import enable_fast_selective_scan


MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]


def local_directory(model: str) -> str:
    """The local directory of a model; one on the Hub is downloaded first.

    Raises:
        ValueError: if it is neither, cannot be reached, or is the folder of a run that has no model itself.
    """
    if Path(model).is_dir():
        refuse_run_folder(model)
        return model
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ValueError(f"{model} is neither a directory nor an id on the Hub (owner/name).")
    try:
        return snapshot_download(model, allow_patterns=MODEL_FILES)
    except Exception as error:  # the network, the Hub and its client raise errors of several libraries
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{model} is neither a directory nor a model that can be loaded from the Hub: {reason}"
        ) from error


def calibration_batches(
    directory: str | Path, settings: CompreSSMConfig, options: Mapping[str, Any], batch_size: int
) -> list[dict[str, Tensor]] | None:
    """Batches of model inputs.

    Args:
        directory: directory of the model, with its tokenizer, if it has one.
        settings: their number of batches, and their seed for the choice of examples, are used; under
            `criterion="fisher"` texts are labels too.
        options: fields of `TextSource` and `SequenceSource`.
        batch_size: examples in each.

    Returns:
        At most `settings.calibration_batches`; None if no source is given and this model has no default.

    Raises:
        ValueError: if a source cannot be read, gives no example, or does not suit the model.
    """
    config = read_saved(directory).config().get_text_config()  # of a composite model, that of the part with the tokens
    count = settings.calibration_batches * batch_size
    continuous = getattr(config, "input_size", None) is not None
    examples = _sequences(options, config) if continuous else _blocks(directory, config, options)
    if examples is None:
        return None
    if not len(examples):
        raise ValueError("The calibration data give no example. Give more text, or a smaller --block-size.")
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(settings.sampling_seed))[:count]
    name = "input_values" if continuous else "input_ids"
    batches = [{name: examples[part]} for part in chosen.split(batch_size)]
    if settings.criterion == "fisher" and not continuous:
        batches = [{**batch, "labels": batch[name]} for batch in batches]
    return batches


@contextmanager
def measuring(model: str, batches: object) -> Iterator[None]:
    """Let stock models run on the fast scan, and make the error for missing data name the options that give them."""
    enable_fast_selective_scan()
    try:
        yield
    except ValueError as error:
        if batches is None and "no calibration was given" in str(error):
            raise ValueError(f"{model} is measured on data: give --train-file or --dataset-name.") from error
        raise


def _sequences(options: Mapping[str, Any], config: PreTrainedConfig) -> Tensor | None:
    """`(examples, length, features)`; None if no source is given."""
    _refuse(options, "train_file", "the model reads sequences of numbers: use --mnist-dir or --dataset-name")
    splits = read_sequences(SequenceSource(**_known(options, SequenceSource)))
    if not splits:
        return None
    sequences = torch.from_numpy(splits[0][0])
    if sequences.shape[2] != config.input_size:
        raise ValueError(
            f"The data have {sequences.shape[2]} features per step, the model reads input_size={config.input_size}."
        )
    return sequences


def _blocks(directory: str | Path, config: PreTrainedConfig, options: Mapping[str, Any]) -> Tensor | None:
    """`(blocks, tokens)`; None if no source is given and the model is not one of bytes."""
    _refuse(options, "mnist_dir", "the model reads tokens: use --train-file or --dataset-name")
    source = TextSource(**_known(options, TextSource))
    tokenizer = _tokenizer(directory, config)
    if not (source.train_file or source.dataset_name) and not isinstance(tokenizer, ByteTokenizer):
        return None
    texts = read_texts(source)
    if tokenizer is None:
        raise ValueError(
            f"{directory} has no tokenizer, and its vocabulary of {config.vocab_size} is not that of bytes "
            f"({ByteTokenizer.vocab_size}). Put the tokenizer's files into the directory."
        )
    return torch.tensor(split_into_blocks(tokenizer(texts)["input_ids"], source.block_size))


def _tokenizer(directory: str | Path, config: PreTrainedConfig) -> Any:
    """The directory's own tokenizer; that of bytes if the vocabulary is that of bytes; else None."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if tokenizer("text", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except (OSError, ValueError):  # there is none
        pass
    except Exception as error:  # any reader may fail in any way: the files may come from anybody
        raise ValueError(f"The tokenizer of {directory} cannot be read ({type(error).__name__}: {error}).") from error
    return ByteTokenizer() if config.vocab_size == ByteTokenizer.vocab_size else None


def _known(options: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    return {item.name: options[item.name] for item in fields(kind) if item.name in options}


def _refuse(options: Mapping[str, Any], name: str, reason: str) -> None:
    if name in options:
        raise ValueError(f"--{name.replace('_', '-')} does not fit: {reason}.")
