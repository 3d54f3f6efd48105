"""A loop of one's own resumes from anywhere and ends as if it had never stopped, with models of any size and kind."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_compressm import Compressor, fit_to_weights
from hf_compressm.scans import disable_fast_selective_scan
from tests.family_table import LRU, MAMBA, MAMBA2, S5, Family, family_id, same
from tests.loop_runs import STEPS, Loop
from tests.own_modules import around_lru, around_mamba, own_layers, own_mixers, two_mambas
from tests.trainers import HALVE


TWICE = {"fraction": 0.3, "start": 1, "end": 6, "num_cuts": 2, "rewarmup_steps": 3}
"""Cuts come after steps 4 and 6."""
STABLE = {"fraction": 0.5, "trigger": "stable", "end": 6, "interval": 1, "num_cuts": 1, "stability_window": 2}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba": (MAMBA.build, TWICE),
    "mamba with a size per layer": (MAMBA.build, {**TWICE, "per_layer": True, "compat": "best"}),
    "mamba2 in a class of ours": (MAMBA2.build, {**TWICE, "compat": "best"}),
    "lru": (LRU.build, TWICE),
    "s5, stable": (S5.build, STABLE),
    "mamba, stable": (MAMBA.build, STABLE),
    "a module around a mamba": (around_mamba, TWICE),
    "a module around an lru": (around_lru, TWICE),
    "a module around two mambas": (two_mambas, TWICE),
    "mixers": (own_mixers, TWICE),
    "layers without a configuration": (own_layers, TWICE),
}
THE_SAME_AGAIN = ("mamba2 in a class of ours", "a module around two mambas", "mixers", "s5, stable")
"""Those that take long, and differ little from others."""


@pytest.fixture(autouse=True)
def stock_scan():
    yield
    disable_fast_selective_scan()


def loop_of(name: str) -> Loop:
    build, settings = RUNS[name]
    return Loop(MAMBA, settings, build(), rate=1e-6 if settings is STABLE else 1e-2)


def told(loop: Loop) -> list[dict[str, Any]]:
    """All that is known of the cuts but how long they took."""
    return [event.to_dict() | {"seconds": 0.0} for event in loop.compressor.events]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in THE_SAME_AGAIN else []) for name in RUNS]
)
def test_a_loop_resumes_bit_for_bit_with_a_model_of_the_first_size(name: str, tmp_path: Path) -> None:
    whole = loop_of(name)
    for step in range(1, STEPS):
        whole.run(step).save(tmp_path / f"{step}")
    whole.run()
    assert "cut" in [event.outcome for event in whole.compressor.events]
    for step in (3, 4, 5):  # before a cut, right after it, and between two
        resumed = loop_of(name).load(tmp_path / f"{step}").run()
        assert same(resumed.state(), whole.state())
        assert told(resumed) == told(whole)
        records = [getattr(getattr(loop.model, "config", None), "compressm", None) for loop in (whole, resumed)]
        assert records[0] == records[1]
        assert resumed.rates == whole.rates[step:]


def test_a_run_that_was_cut_goes_back_to_before_its_cut(tmp_path: Path) -> None:
    loop = Loop(MAMBA, HALVE).run(1)
    loop.save(tmp_path / "early")
    end = copy.deepcopy(loop.run().state())
    assert loop.model.config.state_size == 4
    loop.load(tmp_path / "early")
    assert loop.model.config.state_size == 8
    assert same(loop.run().state(), end)


def test_adapters_resume_across_a_cut(tmp_path: Path) -> None:
    def build() -> Loop:
        torch.manual_seed(0)
        return Loop(MAMBA, HALVE, get_peft_model(MAMBA.build(), LoraConfig(r=2, target_modules=["x_proj"])))

    whole = build().run(4)
    whole.save(tmp_path / "saved")
    whole.run()
    resumed = build().load(tmp_path / "saved").run()
    assert same(resumed.state(), whole.state())


@pytest.mark.parametrize("family", [MAMBA, MAMBA2, LRU, S5], ids=family_id)
def test_weights_of_a_cut_model_fit_a_new_one_and_a_later_optimizer_too(family: Family) -> None:
    loop = Loop(family, HALVE).run()
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    saved = loop.model.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(saved)
    assert fit_to_weights(model, saved, optimizer)
    assert not fit_to_weights(model, saved, optimizer)
    model.load_state_dict(saved)
    optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))  # it would share the moments
    assert model.config.state_size == 4
    batch = family.batch()
    assert torch.equal(model.eval()(**batch).logits, loop.model.eval()(**batch).logits)
    for one, its_optimizer in ((model, optimizer), (loop.model, loop.optimizer)):
        one.train()(**batch).loss.backward()
        its_optimizer.param_groups[0]["lr"] = 1e-3
        its_optimizer.step()
    assert same(model.state_dict(), loop.model.state_dict())


@pytest.mark.parametrize("build", [around_mamba, around_lru, two_mambas, own_mixers, own_layers])
def test_weights_of_a_cut_module_fit_a_new_one(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    loop = Loop(MAMBA, HALVE, build()).run()
    torch.save({f"module.{name}": value for name, value in loop.model.state_dict().items()}, tmp_path / "weights")
    saved = torch.load(tmp_path / "weights", weights_only=True)  # with the prefix of DistributedDataParallel
    model = build()
    assert fit_to_weights(model, saved)
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    batch = MAMBA.batch()
    assert torch.equal(model(**batch)["logits"], loop.model(**batch)["logits"])


def test_weights_of_another_kind_are_refused_and_the_model_stays() -> None:
    model = around_mamba()
    before = copy.deepcopy(dict(model.state_dict()))
    wrong = {name: value for name, value in around_mamba().state_dict().items() if "x_proj" not in name}
    with pytest.raises(ValueError, match=r"no tensor for x_proj\.weight"):
        fit_to_weights(model, wrong)
    odd = dict(before) | {"bb.layers.1.mixer.A_log": torch.zeros(5, 5)}
    with pytest.raises(ValueError, match="A_log"):
        fit_to_weights(model, odd)
    assert same(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": -1}, "no state of a Compressor"),
        ({"schema_version": 99}, "schema_version 99"),
        ({"reduction_share": 2}, "cannot be read"),
        ({"model": None}, "no sizes of a model"),
        ({"model": {"config": None, "shapes": {"a": [1.5]}, "records": {}}}, "no sizes of a model"),
        ({"batches": {"structure": ["list"], "tensors": {}}}, "does not hold the batches"),
        ({"batches": {"structure": ["list", []], "tensors": {}, "autocast": None}}, "does not hold the batches"),
        ({"batches": []}, "does not hold the batches"),
    ],
)
def test_a_state_that_is_none_is_refused_and_nothing_changes(change: dict, match: str) -> None:
    loop, before = Loop(MAMBA), MAMBA.build().state_dict()
    state = loop.run(1).compressor.state_dict()
    other = Loop(MAMBA)
    with pytest.raises(ValueError, match=match):
        other.compressor.load_state_dict(state | change)
    assert same(dict(other.model.state_dict()), dict(before))
    with pytest.raises(ValueError, match="no state of a Compressor"):
        other.compressor.load_state_dict(None)


def test_the_state_of_another_kind_of_model_is_refused() -> None:
    state = Loop(LRU).compressor.state_dict()
    with pytest.raises(ValueError, match="'lru' model"):
        Loop(MAMBA).compressor.load_state_dict(state)


def test_without_batches_a_cut_waits_for_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.remembering.logger.warning_once", told.append)
    model = around_mamba().train()
    compressor = Compressor(model, HALVE)
    tokens = MAMBA.batch()["input_ids"]
    model.register_forward_pre_hook(lambda module, args, kwargs: (args[:1], kwargs), with_kwargs=True)
    model(tokens, object())["logits"].sum().backward()
    compressor.step()
    state = compressor.state_dict()
    assert state["batches"] is None
    assert "cannot keep the batches before a cut" in told[0]
    state["waits"] = True
    resumed = Compressor(model, HALVE)
    resumed.load_state_dict(state)
    model(tokens)["logits"].sum().backward()
    assert [event.step for event in resumed.step()] == [2]


def test_autocast_is_part_of_the_state(tmp_path: Path) -> None:
    loop = Loop(MAMBA, HALVE)
    with torch.autocast("cpu", torch.bfloat16):
        loop.run(1)
    loop.save(tmp_path / "saved")
    resumed = Loop(MAMBA, HALVE).load(tmp_path / "saved")
    assert resumed.compressor.state_dict()["batches"]["autocast"] == ["cpu", "bfloat16"]


def test_the_state_of_another_process_serves_without_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.remembering.logger.warning", told.append)
    state = Loop(MAMBA, HALVE).run(1).compressor.state_dict()
    other = Loop(MAMBA, HALVE)
    other.compressor.load_state_dict(state | {"rank": 1})
    assert other.compressor.state_dict()["batches"] is None
    assert "that of process 1" in told[0]
