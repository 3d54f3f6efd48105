"""trl's trainers on S5 and LRU, plain and with LoRA: they train, and what they save loads and computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.cases import LRU, S5


trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # of trl about its own plans

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
FAST = ("SFT without padding", "Reward")


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("family", [S5, LRU], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "client", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CLIENTS]
)
def test_trains_saves_and_loads(client: str, family: Any, wrapped: bool, tmp_path: Path) -> None:
    is_classifier = client == "Reward"
    model_class = family.classifier_class if is_classifier else family.causal_class
    labels = {"num_labels": 1} if is_classifier else {}
    special = {"pad_token_id": WORDS, "eos_token_id": WORDS + 1, "bos_token_id": WORDS + 1}
    start, saved = str(tmp_path / "start"), str(tmp_path / "saved")
    model_class(family.config(vocab_size=WORDS + 3, **special, **labels)).save_pretrained(start)
    tokenizer().save_pretrained(start)
    model = model_class.from_pretrained(start)
    settings = CLIENTS[client](str(tmp_path))
    if wrapped:
        task = TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM
        settings["peft_config"] = LoraConfig(r=2, task_type=task, target_modules=["gate"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = settings.pop("trainer")(model=model, processing_class=tokenizer(), **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert torch.isfinite(torch.tensor(losses)).all()
    trainer.save_model(saved)
    base = model_class.from_pretrained(start if wrapped else saved)
    loaded = PeftModel.from_pretrained(base, saved) if wrapped else base
    x = torch.arange(6)[None]
    trained = trainer.model.eval()
    assert torch.allclose(loaded.eval()(input_ids=x).logits, trained(input_ids=x).logits, atol=1e-6)
    moved = [name for name, tensor in trained.state_dict().items() if "lora_B" in name and tensor.any()]
    moved += [name for name, tensor in trained.state_dict().items() if not tensor.equal(before.get(name, tensor))]
    assert moved
