"""Cuts inside Trainer, on the CPU, with tiny models."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from tests.family_table import LRU, MAMBA, S5_CLASSIFIER, Family, by_layout, family_id, same, ssm_layers, states_of
from tests.trainers import HALVE, Examples, Stream, callback_of, trainer_of


@pytest.fixture(autouse=True)
def stock_scan():
    yield
    disable_fast_selective_scan()


@pytest.fixture
def warnings_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_compressm.loops.outcome"), "warning", seen.append)
    return seen


class Watch(TrainerCallback):
    """What the optimizer and the model look like around every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.sizes: list[int] = []
        self.unmoved: list[list[str]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
        layer = next(iter(ssm_layers(kwargs["model"]).values()))
        self.sizes.append(states_of(layer))
        self.before = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}
        held = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        assert held == {id(p) for p in kwargs["model"].parameters()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.unmoved.append([name for name, p in named if torch.equal(p, self.before[name])])


@pytest.mark.parametrize("family", by_layout(), ids=family_id)
def test_a_cut_comes_at_the_start_of_the_next_step(family: Family, tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(
        family,
        tmp_path,
        callbacks=[watch],
        save_strategy="steps",
        save_steps=1,
        warmup_steps=0,
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert watch.sizes == [8, 8, 4, 4, 4, 4]
    assert watch.unmoved == [[]] * 6
    saved = {
        int(path.name[11:]): json.loads((path / "config.json").read_text()) for path in tmp_path.glob("checkpoint-*")
    }
    assert [saved[step][family.size_field] for step in range(1, 7)] == watch.sizes
    assert "compressm" not in saved[2]
    assert [cut["step"] for cut in saved[3]["compressm"]["cuts"]] == [2]
    logged = [entry for entry in trainer.state.log_history if "compressm/cut" in entry]
    assert [entry["step"] for entry in logged] == [2]
    assert all(isinstance(value, int | float) for value in logged[0].values())
    assert [logged[0][f"compressm/layer_{i:02d}/state_size"] for i in range(2)] == [4, 4]
    json.dumps(trainer.state.log_history)
    (event,) = callback_of(trainer).events
    assert (event.step, event.result.changed) == (2, True)
    assert all(layer.cut is None for layer in event.result.plan.layers)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_a_rewarmup_lowers_the_rate_and_leaves_the_scheduler_alone(schedule: str, tmp_path: Path) -> None:
    def run(settings: Any) -> tuple[list[float], list[float]]:
        watch = Watch()
        # The watch comes last: it sees the rates that the optimizer will use.
        trainer = trainer_of(
            LRU, tmp_path, settings, callbacks=[watch], max_steps=8, lr_scheduler_type=schedule, warmup_steps=1
        )
        trainer.train()
        return watch.rates, [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    plain, plain_logged = run(None)
    warmed, logged = run({**HALVE, "rewarmup_steps": 3})
    shares = [1, 1, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    assert warmed == pytest.approx([rate * share for rate, share in zip(plain, shares, strict=True)])
    assert logged == plain_logged


def test_a_second_run_starts_with_the_full_rate(tmp_path: Path) -> None:
    model = LRU.build()
    for _ in range(2):
        watch = Watch()
        settings = {**HALVE, "fraction": 0.3, "end": 4, "rewarmup_steps": 2}
        trainer_of(LRU, tmp_path, settings, model, callbacks=[watch], lr_scheduler_type="constant").train()
        assert watch.rates == pytest.approx([1e-3] * 4 + [1e-3 / 3, 2e-3 / 3])


def test_training_twice_with_one_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, {**HALVE, "fraction": 0.3})
    trainer.train()
    trainer.train()
    assert [cut["step"] for cut in trainer.model.config.compressm["cuts"]] == [2, 2]
    assert len(callback_of(trainer).events) == 1


@pytest.mark.parametrize("family", [MAMBA, LRU, S5_CLASSIFIER], ids=family_id)
def test_a_gate_that_blocks_everything_leaves_the_run_bit_equal(
    family: Family, tmp_path: Path, warnings_seen: list[str]
) -> None:
    blocked = {"tolerance": 0.001, "min_reduction": 0.99, "end": 4, "num_cuts": 2}
    states = []
    for settings in (None, blocked):
        torch.manual_seed(1)
        if settings is None and family is MAMBA:  # the callback switches the fast scan on
            enable_fast_selective_scan()
        trainer = trainer_of(family, tmp_path, settings)
        trainer.train()
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert same(*states)
    assert len(warnings_seen) == 1
    assert "none shrank a layer" in warnings_seen[0]
    assert "nothing worth cutting" in warnings_seen[0]
    assert "A larger tolerance would cut more" in warnings_seen[0]


def test_a_smaller_budget_is_what_cuts_more(tmp_path: Path, warnings_seen: list[str]) -> None:
    trainer_of(S5_CLASSIFIER, tmp_path, {"budget": 0.9, "min_state_size": 8, "end": 4, "num_cuts": 1}).train()
    assert "A smaller budget would cut more" in warnings_seen[-1]


def test_an_unstable_layer_is_left_alone_and_the_way_out_is_named(tmp_path: Path, warnings_seen: list[str]) -> None:
    trainer = trainer_of(S5_CLASSIFIER, tmp_path, HALVE)
    for module in ssm_layers(trainer.model).values():
        torch.nn.init.constant_(module.Lambda_re, 0.01)
    before = {name: module.B_re.shape for name, module in ssm_layers(trainer.model).items()}
    trainer.train()
    assert {name: module.B_re.shape for name, module in ssm_layers(trainer.model).items()} == before
    assert all("unstable, max |eigenvalue|" in text and "clip_eigs=True" in text for text in warnings_seen)
    assert "none shrank a layer" in warnings_seen[-1]
    assert "would cut more" not in warnings_seen[-1]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.01},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"train_dataset": Stream()},
        {"auto_find_batch_size": True},
    ],
    ids=lambda kwargs: next(iter(kwargs)) + str(next(iter(kwargs.values())))[:9],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", [pytest.param(MAMBA, marks=pytest.mark.slow), LRU], ids=family_id)
def test_ways_to_train(family: Family, kwargs: dict, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path, max_steps=4, **kwargs)
    trainer.train()
    assert trainer.model.config.state_size == 4
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


@pytest.mark.parametrize("family", [MAMBA, LRU, S5_CLASSIFIER], ids=family_id)
def test_evaluation_with_metrics_after_a_cut(family: Family, tmp_path: Path) -> None:
    trainer = trainer_of(
        family,
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=Examples(family, 4),
        compute_metrics=lambda prediction: {"size": float(prediction.predictions.shape[-1])},
    )
    trainer.train()
    assert trainer.evaluate()["eval_size"] > 0


def test_settings_as_a_dict_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    CompreSSMConfig(**HALVE).to_file(path)
    callbacks = [CompreSSMCallback(source) for source in (HALVE, CompreSSMConfig(**HALVE), path, str(path))]
    assert all(callback.config == CompreSSMConfig(**HALVE) for callback in callbacks)
    assert CompreSSMCallback().config == CompreSSMConfig()


def test_settings_given_before_training_are_those_of_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, {**HALVE, "fraction": 0.25})
    callback = callback_of(trainer)
    callback.config = {**HALVE, "rewarmup_steps": 2}
    assert callback.config == CompreSSMConfig(**HALVE, rewarmup_steps=2)
    trainer.train()
    assert trainer.model.config.state_size == 4
    assert trainer.state.stateful_callbacks["CompreSSMCallback"]["args"]["config"]["rewarmup_steps"] == 2
    with pytest.raises(ValueError, match="config must be a CompreSSMConfig"):
        callback.config = 0.5


def test_a_callback_added_later_cuts_and_logs(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, None, save_strategy="steps", save_steps=3)
    trainer.add_callback(CompreSSMCallback(HALVE))
    trainer.train()
    assert trainer.model.config.state_size == 4
    assert any("compressm/cut" in entry for entry in trainer.state.log_history)


def test_a_checkpoint_from_before_the_callback_is_resumed_with_it(tmp_path: Path) -> None:
    trainer_of(LRU, tmp_path, None, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = trainer_of(LRU, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.model.config.state_size == 4


def test_the_state_of_the_callback_is_restored(tmp_path: Path) -> None:
    settings = {**HALVE, "end": 4}
    trainer_of(LRU, tmp_path, settings, save_strategy="steps", save_steps=2).train()
    stored = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["CompreSSMCallback"]["args"]["config"]["end"] == 4
    trainer = trainer_of(
        LRU, tmp_path, {**HALVE, "end": 5}, restore_callback_states_from_checkpoint=True, save_strategy="no"
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [cut["step"] for cut in trainer.model.config.compressm["cuts"]] == [4]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fraction": 0.5, "end": 0.01}, "No cut can happen"),
        ({"fraction": 0.5, "start": 50, "end": 60}, "No cut can happen"),
        ({"target_state_size": 99, "end": 2}, "target_state_size=99"),
        ({"fraction": 0.5, "end": 2, "criterion": "surrogate"}, "surrogate"),
        ({"fraction": 0.5, "end": 2, "layers": ["nowhere"]}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(settings: dict, match: str, tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, settings)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two CompreSSMCallbacks"):
        trainer_of(LRU, tmp_path, callbacks=[CompreSSMCallback(HALVE)]).train()


def test_a_run_that_ends_before_its_first_cut_says_so(tmp_path: Path, warnings_seen: list[str]) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    trainer_of(LRU, tmp_path, callbacks=[Stop()]).train()
    assert len(warnings_seen) == 1
    assert "cut nothing: training ended at step 1" in warnings_seen[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sizes_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer_of(LRU, tmp_path, report_to=["tensorboard"]).train()
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    tag = "train/compressm/layer_00/state_size"
    assert [(event.step, event.value) for event in events.Scalars(tag)] == [(2, 4.0)]
