"""trl's trainers, plain and with LoRA, through two cuts: they train, save, and load at the smaller size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_compressm import CompreSSMCallback
from hf_compressm.checkpoints import read_saved
from tests.family_table import JAMBA, MAMBA, MAMBA2, S5, Family
from tests.trainers import callback_of
from tests.trl_clients import CLIENTS, WORDS, tokenizer


pytestmark = pytest.mark.filterwarnings("ignore")  # of trl about its own plans

TWICE = {"fraction": 0.5, "end": 4, "num_cuts": 2, "calibration_batches": 2}
TARGETS = {"mamba": ["x_proj", "in_proj"], "mamba2": ["in_proj"], "s5": ["gate"], "jamba": ["x_proj", "q_proj"]}
NAMES = ("SFT", "SFT without padding", "SFT packed", "DPO", "KTO", "GRPO", "Reward")
FAST = (("GRPO", "mamba", "plain"), ("DPO", "s5", "LoRA"), ("Reward", "s5", "plain"), ("SFT packed", "s5", "LoRA"))


def cells() -> list[Any]:
    """Every client on every family, plain and with LoRA; rewards on a Mamba of which there is a classifier."""
    found = []
    for client in NAMES:
        packs = client in ("SFT without padding", "SFT packed")  # where states run on, all is as with padding
        for family in (S5,) if packs else (JAMBA, S5) if client == "Reward" else (MAMBA, MAMBA2, S5):
            for kind in ("plain", "LoRA"):
                marks = [] if (client, family.name, kind) in FAST else [pytest.mark.slow]
                found.append(
                    pytest.param(client, family, kind == "LoRA", id=f"{client}-{family.name}-{kind}", marks=marks)
                )
    return found


def model_of(family: Family, folder: Path, is_classifier: bool) -> Any:
    """A model that was saved and loaded, as trl expects of a policy with a reference."""
    special = {"pad_token_id": WORDS, "eos_token_id": WORDS + 1, "bos_token_id": WORDS + 1}
    config = family.build(vocab_size=WORDS + 3, state_size=16, **special).config
    config.num_labels = 1
    kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return kind.from_pretrained(folder)


@pytest.mark.parametrize(("client", "family", "wrapped"), cells())
def test_trains_through_two_cuts_saves_and_loads(client: str, family: Family, wrapped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    is_classifier = client == "Reward"
    settings = CLIENTS[client](str(tmp_path / "run"))
    args = settings["args"]
    args.max_steps, args.save_strategy, args.save_steps = 6, "steps", 3
    if wrapped:
        task = "SEQ_CLS" if is_classifier else "CAUSAL_LM"
        settings["peft_config"] = LoraConfig(r=2, task_type=task, target_modules=TARGETS[family.name])
    trainer = settings.pop("trainer")(
        model=model_of(family, tmp_path / "start", is_classifier),
        processing_class=tokenizer(),
        callbacks=[CompreSSMCallback(TWICE)],
        **settings,
    )
    trainer.train()
    assert [(event.step, event.outcome) for event in callback_of(trainer).events] == [(2, "cut"), (4, "cut")]
    trainer.save_model(str(tmp_path / "saved"))
    read_saved(tmp_path / "run" / "checkpoint-6")
    trained = trainer.model.eval()
    if wrapped:
        kind = AutoPeftModelForSequenceClassification if is_classifier else AutoPeftModelForCausalLM
        loaded = kind.from_pretrained(tmp_path / "saved", **({"num_labels": 1} if is_classifier else {}))
    else:
        loaded = type(trained).from_pretrained(tmp_path / "saved")
    tokens = torch.arange(6)[None]
    logits = [model.eval()(input_ids=tokens).logits for model in (trained, loaded)]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [event.step for event in callback_of(trainer).events] == [2, 4]
