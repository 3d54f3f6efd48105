"""What would keep parameters from before a cut is found before the first step, and named."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer

from hf_compressm.training import copies
from tests.family_table import LRU
from tests.trainers import callback_of, trainer_of


class ExponentialMovingAverage:
    """As torch_ema has it: copies in a list."""

    def __init__(self, parameters: Any) -> None:
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]


class Norms:
    """Somebody's helper."""

    def __init__(self, model: nn.Module) -> None:
        self.watched = {"decay": [p for name, p in model.named_parameters() if name.endswith("nu_log")]}


class Loss:
    """An average of something small."""

    def __init__(self) -> None:
        self.ema = torch.zeros(3)


KEPT: dict[str, Callable[[nn.Module], Any]] = {
    "an averaged model": AveragedModel,
    "averages as torch_ema has them": lambda model: ExponentialMovingAverage(model.parameters()),
    "a list": lambda model: [p for p in model.parameters() if p.requires_grad],
    "groups": lambda model: {"decay": {"params": tuple(model.parameters())}},
    "a set": lambda model: set(model.parameters()),
    "a parameter": lambda model: model.backbone.layers[0].ssm.B_re,
    "a helper": Norms,
    "an average in a list": lambda model: [AveragedModel(model)],
}
HARMLESS: dict[str, Callable[[nn.Module], Any]] = {
    "a teacher": copy.deepcopy,
    "embeddings": lambda model: [model.get_input_embeddings().weight],
    "a small average": lambda model: Loss(),
    "numbers": lambda model: {"loss": [1.0, 2.0], "backbone.layers.0.ssm.B_re": 3.0},
    "a rate": lambda model: 0.99,
    "copies to compare with": lambda model: {name: p.detach().clone() for name, p in model.named_parameters()},
}


@pytest.mark.parametrize("kind", KEPT)
def test_an_attribute_of_the_trainer_that_keeps_parameters_is_named_before_the_first_step(
    kind: str, tmp_path: Path
) -> None:
    trainer = trainer_of(LRU, tmp_path)
    trainer.held = KEPT[kind](trainer.model)
    with pytest.raises(ValueError, match=r"^Trainer\.held holds parameters or averages.*by name"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["ema", "shadow", "averages"])
def test_a_table_of_copies_is_an_average_if_its_name_says_so(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path)
    setattr(trainer, name, {key: p.detach().clone() for key, p in trainer.model.named_parameters()})
    with pytest.raises(ValueError, match=rf"^Trainer\.{name} holds"):
        trainer.train()


@pytest.mark.parametrize("name", ["ema", "ema_model", "swa_model", "model_ema"])
def test_a_copy_of_the_model_is_an_average_if_its_name_says_so(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path)
    setattr(trainer, name, copy.deepcopy(trainer.model))
    with pytest.raises(ValueError, match=rf"^Trainer\.{name} holds"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_does_not_depend_on_the_state_size_is_left_alone(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, max_steps=3)
    trainer.held = HARMLESS[kind](trainer.model)
    trainer.train()
    assert callback_of(trainer).events[-1].outcome == "cut"


class Late(Trainer):
    """Makes its average when it first needs it."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "average"):
            self.average = AveragedModel(self.model)
        return super().training_step(*args, **kwargs)


def test_what_was_made_since_is_found_before_the_cut(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, trainer_class=Late)
    size = trainer.model.config.state_size
    with pytest.raises(ValueError, match=r"^Late\.average holds"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.model.config.state_size == size


class Renewing(Trainer):
    """Makes its list anew at every step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.trained = list(self.model.parameters())
        return super().training_step(*args, **kwargs)


def test_a_list_that_may_be_renewed_at_every_step_is_only_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(copies.logger, "warning", seen.append)
    trainer = trainer_of(LRU, tmp_path, trainer_class=Renewing)
    trainer.train()
    assert callback_of(trainer).events[-1].outcome == "cut"
    assert [text for text in seen if text.startswith("Renewing.trained holds")]
