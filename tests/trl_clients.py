"""trl's trainers and what each is trained on: tiny datasets of made-up words."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


trl = pytest.importorskip("trl")

WORDS = 36
TEXTS = [(f"w{k} w{k + 1} w{k + 2}", f" w{k + 3}", f" w{k + 4} w{k + 5}") for k in range(8)]
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"<pad>": WORDS, "<eos>": WORDS + 1, "<unk>": WORDS + 2}
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(WORDS)} | special, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def prompts(*names: str) -> Dataset:
    columns = dict(zip(("prompt", "chosen", "rejected"), zip(*TEXTS, strict=True), strict=True))
    return Dataset.from_dict({name: columns[name] for name in names})


def supervised(folder: str, **options: Any) -> dict[str, Any]:
    rows = Dataset.from_dict({"text": ["".join(parts) for parts in TEXTS]})
    return {"trainer": trl.SFTTrainer, "args": trl.SFTConfig(folder, **COMMON, **options), "train_dataset": rows}


def preferred(folder: str) -> dict[str, Any]:
    rows = prompts("prompt", "chosen", "rejected")
    return {"trainer": trl.DPOTrainer, "args": trl.DPOConfig(folder, **COMMON), "train_dataset": rows}


def judged(folder: str) -> dict[str, Any]:
    rows = prompts("prompt", "chosen").rename_column("chosen", "completion")
    rows = rows.add_column("label", [bool(k % 2) for k in range(len(rows))])
    return {"trainer": trl.KTOTrainer, "args": trl.KTOConfig(folder, **COMMON), "train_dataset": rows}


def rewarded(folder: str) -> dict[str, Any]:
    return {
        "trainer": trl.GRPOTrainer,
        "args": trl.GRPOConfig(folder, num_generations=2, max_completion_length=4, **COMMON),
        "train_dataset": prompts("prompt"),
        "reward_funcs": lambda completions, **others: [float(len(text)) for text in completions],
    }


def reward_model(folder: str) -> dict[str, Any]:
    rows = prompts("chosen", "rejected")
    return {"trainer": trl.RewardTrainer, "args": trl.RewardConfig(folder, **COMMON), "train_dataset": rows}


CLIENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "SFT": supervised,
    "SFT without padding": lambda folder: supervised(folder, padding_free=True, max_length=None),
    "SFT packed": lambda folder: supervised(folder, packing=True, max_length=16),
    "DPO": preferred,
    "KTO": judged,
    "GRPO": rewarded,
    "Reward": reward_model,
}
