"""Every kind of adapter goes through a cut, saving, loading and resuming, or is refused at the start by name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compressm.peft.saved_base import plain_state
from tests.family_table import MAMBA, MAMBA2, Family, outputs, same
from tests.trainers import callback_of, trainer_of


def config(kind: str, **settings: Any) -> Callable[[], Any]:
    """A maker of configurations; peft changes lists that it is given."""
    return lambda: getattr(peft, kind)(task_type="CAUSAL_LM", **copy.deepcopy(settings))


LORA: dict[str, Any] = {"r": 2, "target_modules": ["x_proj", "in_proj"]}
SMALL: dict[str, Any] = {"num_virtual_tokens": 3, "num_attention_heads": 1, "num_layers": 2, "token_dim": 6}
TOKENS: dict[str, tuple[Family, Callable[[], Any], dict[str, Any]]] = {
    "tied": (MAMBA, config("LoraConfig", **LORA, trainable_token_indices=[3, 4]), {"tie_word_embeddings": True}),
    "untied": (MAMBA, config("LoraConfig", **LORA, trainable_token_indices=[3, 4]), {"tie_word_embeddings": False}),
    "alone": (MAMBA, config("TrainableTokensConfig", token_indices=[3, 4]), {"tie_word_embeddings": True}),
    "mamba2": (
        MAMBA2,
        config("LoraConfig", r=2, target_modules=["in_proj"], trainable_token_indices={"embeddings": [3, 4]}),
        {"tie_word_embeddings": True},
    ),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "prompt tuning": config("PromptTuningConfig", **SMALL),
    "norms": config("LNTuningConfig", target_modules=["norm"]),
    "ia3": config("IA3Config", target_modules=["in_proj"], feedforward_modules=[]),
    "vera": config("VeraConfig", target_modules=["in_proj"], r=4),
    "loha": config("LoHaConfig", target_modules=["in_proj"], r=2),
    "lokr": config("LoKrConfig", target_modules=["in_proj"], r=2),
    "oft": config("OFTConfig", target_modules=["in_proj"], oft_block_size=3),
    "adalora": config(
        "AdaLoraConfig", target_modules=["in_proj"], init_r=4, target_r=2, total_step=6, tinit=1, tfinal=2
    ),
    "pissa": config("LoraConfig", **LORA, init_lora_weights="pissa"),
    "rslora": config("LoraConfig", r=2, target_modules=["in_proj", "x_proj", "dt_proj", "lm_head"], use_rslora=True),
    "biases": config("LoraConfig", **LORA, bias="all"),
    "embeddings": config("LoraConfig", r=2, target_modules=["x_proj", "embeddings"]),
    "copies of tied weights": config(
        "LoraConfig", **LORA, modules_to_save=["lm_head", "embeddings"], ensure_weight_tying=True
    ),
    "parameters": config("LoraConfig", r=2, target_modules=["dt_proj"], target_parameters=["in_proj.weight"]),
}


def run(family: Family, kind: Callable[[], Any], folder: Path, resume: Path | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(family.build(**settings), kind())
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    trainer = trainer_of(family, folder, model=model, remove_unused_columns=False, **saving)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def goes_through(family: Family, kind: Callable[[], Any], folder: Path, **settings: Any) -> None:
    trainer = run(family, kind, folder / "run", **settings)
    assert callback_of(trainer).events[-1].outcome == "cut"
    trainer.save_model(str(folder / "saved"))
    batch = {"input_ids": family.batch()["input_ids"]}
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "saved")
    assert (outputs(loaded.eval(), batch) - outputs(trainer.model.eval(), batch)).abs().max() < 1e-5
    resumed = run(family, kind, folder / "again", folder / "run/checkpoint-3", **settings)
    assert same(dict(resumed.model.named_parameters()), dict(trainer.model.named_parameters()))


@pytest.mark.parametrize("kind", TOKENS)
def test_trained_tokens_go_through_a_cut(kind: str, tmp_path: Path) -> None:
    family, tokens, settings = TOKENS[kind]
    goes_through(family, tokens, tmp_path, **settings)


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_below_trained_tokens_is_saved_under_plain_names(tied: bool, tmp_path: Path) -> None:
    trainer = run(MAMBA, TOKENS["tied"][1], tmp_path, tie_word_embeddings=tied)
    state = plain_state(trainer.model)
    assert not any("token_adapter" in name for name in state)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6/base_model")
    assert same(dict(base.state_dict()), state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_kind_goes_through_a_cut(kind: str, tmp_path: Path) -> None:
    goes_through(MAMBA, OTHERS[kind], tmp_path, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (config("AdaLoraConfig", target_modules=["x_proj"], total_step=6), r"adalora"),
        (config("VeraConfig", target_modules=["x_proj"]), r"vera"),
        (config("OFTConfig", target_modules=["x_proj"], oft_block_size=3), r"oft"),
        (config("LoKrConfig", target_modules=["x_proj"]), r"lokr"),
        (config("LoraConfig", target_modules=["in_proj"], target_parameters=["mixer.A_log"]), "whole SSM layer"),
    ],
)
def test_what_would_not_follow_is_refused_at_the_start(kind: Any, match: str, tmp_path: Path) -> None:
    trainer = trainer_of(MAMBA, tmp_path, model=peft.get_peft_model(MAMBA.build(), kind()))
    with pytest.raises(ValueError, match=rf"{match}.*merge_and_unload"):
        trainer.train()
    assert trainer.state.global_step == 0
