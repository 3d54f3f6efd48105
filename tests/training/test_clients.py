"""Trainers that are not plain ones: subclasses with steps of their own, `Seq2SeqTrainer`, and trl's `SFTTrainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from hf_compressm import CompreSSMCallback
from tests.family_table import LRU, MAMBA, S5, Family, family_id
from tests.matrix import ALLOWED, CHECKPOINTING, SETTINGS, STEPS, Audit, Cell, check_run, run_cell, warnings_collected
from tests.trainers import Examples


TEXTS = [
    f"the {a} {b} the {c} ." for a in ("big", "small") for b in ("cat sees", "dog hears") for c in ("bird", "cow")
]


class OwnSteps(Trainer):
    """Everything that people override."""

    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = list(self.model.named_parameters())
            fast = [p for name, p in named if "embeddings" in name]
            slow = [p for name, p in reversed(named) if "embeddings" not in name]
            groups = [{"params": slow, "weight_decay": 0.1}, {"params": fast, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, betas=(0.8, 0.9))
        return self.optimizer


slow_on_others = [LRU, *(pytest.param(family, marks=pytest.mark.slow) for family in (MAMBA, S5))]


@pytest.mark.parametrize("family", slow_on_others, ids=family_id)
def test_a_subclass_with_its_own_step_loss_and_optimizer(family: Family, tmp_path: Path) -> None:
    cell = Cell("own", {"gradient_accumulation_steps": 2}, {"trainer_class": lambda family: OwnSteps})
    trainer, _ = run_cell(cell, family, tmp_path)
    assert trainer.steps == 2 * STEPS


@pytest.mark.parametrize("family", slow_on_others, ids=family_id)
def test_a_seq2seq_trainer_that_generates_before_and_after_the_cuts(family: Family, tmp_path: Path) -> None:
    model, audit = family.build(state_size=16, pad_token_id=0), Audit("carried")
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=5,
        predict_with_generate=True,
        generation_max_length=12,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=2,
    )
    with warnings_collected() as seen:
        trainer = Seq2SeqTrainer(
            model=model,
            args=args,
            train_dataset=Examples(family),
            eval_dataset=Examples(family, 4),
            compute_metrics=lambda prediction: {"length": float(prediction.predictions.shape[-1])},
            callbacks=[CompreSSMCallback(SETTINGS), audit],
        )
        trainer.train()
    check_run(trainer, audit)
    lengths = [entry["eval_length"] for entry in trainer.state.log_history if "eval_length" in entry]
    assert len(lengths) == 4
    assert min(lengths) >= 12
    assert [text for text in seen if not any(part in text for part in ALLOWED)] == []


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<eos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


SFT = {
    "plain": {},
    "completions": {"completion_only_loss": True},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "plain" else pytest.mark.slow) for kind in SFT]
)
@pytest.mark.parametrize("family", slow_on_others, ids=family_id)
def test_supervised_fine_tuning_with_trl(family: Family, kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    tokenizer = tiny_tokenizer()
    rows: dict[str, list[str]] = {"text": TEXTS}
    if kind == "completions":
        rows = {"prompt": [text[:-2] for text in TEXTS], "completion": [text[-2:] for text in TEXTS]}
    model = family.build(state_size=16, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=1)
    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=10,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        **{CHECKPOINTING: True},  # the default, under the name that does not warn
        **SFT[kind],
    )
    audit = Audit("carried")
    with warnings_collected() as seen:
        trainer = trl.SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            callbacks=[CompreSSMCallback(SETTINGS), audit],
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    check_run(trainer, audit)
    assert [text for text in seen if not any(part in text for part in ALLOWED)] == []
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    prompt = tokenizer("the big cat", return_tensors="pt")
    tokens = [m.eval().generate(prompt["input_ids"], max_new_tokens=4, do_sample=False) for m in (model, reloaded)]
    assert torch.equal(*tokens)
    assert reloaded.config.state_size == audit.sizes[-1]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
