"""A loop of one's own is cut as a Trainer's run is, to the last bit, and nothing of it is disturbed."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, Compressor
from hf_compressm.scans import disable_fast_selective_scan
from tests.family_table import LRU, MAMBA, MAMBA2, S5, Family, family_id, same, snapshot
from tests.loop_runs import STEPS, Loop, state_of, trained
from tests.own_modules import around_mamba, own_layers
from tests.trainers import HALVE, callback_of


STABLE = {"fraction": 0.5, "trigger": "stable", "end": 10, "interval": 1, "num_cuts": 1, "stability_window": 2}
TWICE = {"fraction": 0.3, "start": 1, "end": 6, "num_cuts": 2, "rewarmup_steps": 3}
SETTINGS = {
    "one cut": HALVE,
    "two cuts and a re-warm-up": TWICE,
    "a stable ranking": {**STABLE, "end": 6},
    "one batch": {**HALVE, "calibration_batches": 1},
}


@pytest.fixture(autouse=True)
def stock_scan():
    yield
    disable_fast_selective_scan()


@pytest.mark.parametrize("family", [MAMBA, LRU, S5, pytest.param(MAMBA2, marks=pytest.mark.slow)], ids=family_id)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_loop_ends_where_the_trainer_ends(name: str, family: Family, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    rate = 1e-6 if name == "a stable ranking" else 1e-2  # so low that the ranking hardly moves
    trainer = trained(family, tmp_path, settings, rate=rate)
    loop = Loop(family, settings, rate=rate).run()
    events = loop.compressor.events
    assert [event.outcome for event in events] == ["cut"] * len(events) != []
    theirs = callback_of(trainer).events
    assert [(event.step, event.sizes) for event in events] == [(event.step, event.sizes) for event in theirs]
    assert same(loop.state(), state_of(trainer.model, trainer.optimizer))
    assert loop.model.config.compressm == trainer.model.config.compressm


def test_the_rates_rise_again_after_a_cut_and_the_scheduler_does_not_see_it() -> None:
    ends = [Loop(LRU, {**HALVE, "rewarmup_steps": steps}).run() for steps in (0, 3)]
    shares = [low / high for low, high in zip(ends[1].rates, ends[0].rates, strict=True)]
    assert shares == pytest.approx([1, 1, 0.25, 0.5, 0.75, 1, 1, 1])
    assert ends[0].scheduler.get_last_lr() == ends[1].scheduler.get_last_lr()


def test_a_step_that_fails_leaves_no_low_rate_behind() -> None:
    loop = Loop(LRU, {**HALVE, "rewarmup_steps": 3}).run(2)
    rate = loop.optimizer.param_groups[0]["lr"]

    def fails() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="luck"):
        loop.optimizer.step(fails)
    loop.run(3)
    assert loop.rates[-1] == pytest.approx(rate / 4)


def test_a_compressor_that_is_gone_leaves_the_rates_alone() -> None:
    loop = Loop(LRU, {**HALVE, "rewarmup_steps": 3}).run(2)
    rate = loop.optimizer.param_groups[0]["lr"]
    loop.compressor = Compressor(loop.model, {**HALVE, "end": 100}, loop.optimizer)
    loop.run(3)
    assert loop.rates[-1] == rate


def test_a_step_returns_its_events_and_has_something_to_log() -> None:
    seen: list[tuple[int, int]] = []
    loop = Loop(LRU, HALVE)
    loop.run(after=lambda events: seen.append((len(events), len(loop.compressor.logs))))
    assert [count for count, _ in seen] == [0, 1, 0, 0, 0, 0, 0, 0]
    assert [logged > 0 for _, logged in seen] == [count > 0 for count, _ in seen]
    loop = Loop(LRU, STABLE)
    loop.run(1)
    assert loop.compressor.logs == {"compressm/rank_measured_layers": 2.0}


def test_calibration_of_ones_own_is_measured_on_and_no_hook_is_needed() -> None:
    loop = Loop(MAMBA, {**HALVE, "calibration_batches": 2}, calibration=MAMBA.calibration(3))
    assert len(loop.model._forward_pre_hooks) == 0
    other = Loop(MAMBA, {**HALVE, "calibration_batches": 2})
    assert len(other.model._forward_pre_hooks) == 1
    assert not same(loop.run().state(), other.run().state())
    assert {event.outcome for event in loop.compressor.events} == {"cut"}


def test_looking_disturbs_neither_model_nor_generators_nor_the_run() -> None:
    """A run that is measured, once or at every step, and never cut ends as one without a Compressor does."""
    ends = []
    for settings in (None, {**HALVE, "end": 100}, {**STABLE, "stability": 0.9999999999}):
        torch.manual_seed(0)
        model = MAMBA.build()
        model.add_module("dropout", nn.Dropout(0.5))
        model.lm_head.register_forward_pre_hook(lambda module, args, own=model: (own.dropout(args[0]), *args[1:]))
        loop = Loop(MAMBA, settings, model, steps=200, rate=0.1)
        if settings is None:
            loop.compressor = SimpleNamespace(step=list, events=[])
        loop.run(6)
        assert loop.compressor.events == []
        ends.append({"state": loop.state(), "generator": torch.get_rng_state(), "modes": snapshot(model)["modes"]})
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_after_the_last_cut_the_model_has_no_hook_of_ours_and_batches_are_free() -> None:
    loop = Loop(MAMBA, HALVE).run(1)
    assert len(loop.model._forward_pre_hooks) == 1
    loop.run(3)
    assert len(loop.model._forward_pre_hooks) == 0
    assert loop.compressor.state_dict()["batches"] is None


def test_a_compressor_that_is_gone_leaves_no_hook_and_copies_of_the_model_have_none_at_work() -> None:
    loop = Loop(MAMBA, {**HALVE, "end": 7, "calibration_batches": 8}).run(1)
    kept = loop.compressor.state_dict()["batches"]["structure"]
    copied, pickled = copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))
    for one in (copied, pickled):
        one.train()(**loop.batches[5])
    assert loop.compressor.state_dict()["batches"]["structure"] == kept
    model = loop.model
    del loop.compressor
    assert len(model._forward_pre_hooks) == 0


def test_evaluations_between_the_steps_are_not_measured_on() -> None:
    def evaluate(events: Any) -> None:
        with torch.no_grad():
            evaluated.model(**MAMBA.batch(seed=77))
        evaluated.model.eval()(**MAMBA.batch(seed=78))
        evaluated.model.train()

    plain, evaluated = Loop(MAMBA), Loop(MAMBA)
    plain.run()
    evaluated.run(after=evaluate)
    assert same(plain.state(), evaluated.state())


def test_positional_arguments_and_inputs_with_a_graph_are_kept() -> None:
    model = around_mamba().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor = Compressor(model, HALVE, optimizer)
    batch = MAMBA.batch()
    for _ in range(3):
        model(batch["input_ids"], batch["labels"])["loss"].backward()
        optimizer.step()
        compressor.step()
    assert [(event.step, event.outcome) for event in compressor.events] == [(2, "cut")]


def test_a_model_is_measured_under_the_autocast_of_its_training() -> None:
    seen: list[tuple[bool, bool]] = []
    loop = Loop(MAMBA, HALVE)
    loop.model.lm_head.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", torch.bfloat16):
        loop.model(**loop.batches[0]).loss.backward()
    loop.optimizer.step()
    loop.compressor.step()
    assert seen == [(True, True), (False, True)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_a_compiled_model_goes_on() -> None:
    torch.compiler.reset()
    plain, compiled = Loop(LRU).run(), Loop(LRU, model=torch.compile(LRU.build(), backend="eager"))
    compiled.run()
    assert [event.sizes for event in compiled.compressor.events] == [event.sizes for event in plain.compressor.events]
    assert compiled.model._orig_mod.config.state_size == 4


def test_without_shares_the_length_is_not_needed() -> None:
    loop = Loop(LRU, HALVE, total_steps=None).run()
    assert [event.step for event in loop.compressor.events] == [2]
    assert same(loop.state(), Loop(LRU, HALVE).run().state())


def test_steps_beyond_the_end_are_made_without_cuts_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.compressor.logger.warning", told.append)
    loop = Loop(LRU, {**HALVE, "end": 100}, total_steps=101)
    loop.run(3)
    short = Loop(LRU, {"fraction": 0.5, "end": 0.5, "num_cuts": 1}, total_steps=4).run(12)
    assert [event.step for event in short.compressor.events] == [2]
    assert told == [told[0]]
    assert "total_steps=4" in told[0]


def test_a_run_without_a_cut_says_so_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.outcome.logger.warning", told.append)
    Loop(LRU, {**STABLE, "stability": 0.9999999999}, rate=0.3).run(STEPS - 1)
    assert told == []
    Loop(LRU, {**STABLE, "stability": 0.9999999999}, rate=0.3).run()
    assert "cut nothing" in told[0]


def test_an_optimizer_that_was_not_passed_is_warned_of_and_can_be_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.refusals.logger.warning", told.append)
    loop = Loop(LRU, HALVE, optimizer=None)
    assert len(told) == 1
    assert "has no optimizer" in told[0]

    def renew(events: list[Any]) -> None:
        if events:
            held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
            assert not {id(p) for p in loop.model.parameters()} <= held
            loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-3)

    before = {name: value.clone() for name, value in loop.run(2, renew).model.named_parameters()}
    loop.run(4, renew)
    assert all(not torch.equal(before[name], value) for name, value in loop.model.named_parameters())
    assert "No optimizer was passed" in loop.compressor.events[0].result.note
    assert len(told) == 1


def test_several_optimizers_follow_a_cut() -> None:
    loop = Loop(own_family := LRU, {**HALVE, "rewarmup_steps": 2})
    half = len(list(loop.model.parameters())) // 2
    parameters = list(loop.model.parameters())
    optimizers = [torch.optim.SGD(parameters[:half], lr=0.1), torch.optim.AdamW(parameters[half:], lr=0.1)]
    compressor = Compressor(loop.model, HALVE, optimizers)
    for _ in range(3):
        loop.model(**own_family.batch()).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        compressor.step()
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loop.model.parameters()}


def test_a_guard_undoes_a_cut_and_tries_a_gentler_one() -> None:
    losses = [1.0, 2.0, 1.0]
    settings = {**HALVE, "max_loss_increase": 0.5, "max_retries": 1}
    loop = Loop(MAMBA, settings, held_out_loss=lambda: losses.pop(0)).run()
    assert [event.outcome for event in loop.compressor.events] == ["undone", "cut"]
    assert [event.before for event in loop.compressor.events] == [1.0, 1.0]
    assert loop.model.config.state_size == 6


def test_a_run_whose_cuts_are_all_undone_ends_as_the_run_alone() -> None:
    hurts = {**HALVE, "max_loss_increase": 0.0, "max_retries": 1, "rewarmup_steps": 3}
    values = iter(range(100))
    undone = Loop(MAMBA, hurts, held_out_loss=lambda: float(next(values))).run()
    assert [event.outcome for event in undone.compressor.events] == ["undone", "undone"]
    alone = Loop(MAMBA, {**HALVE, "end": 100}, total_steps=101).run()
    assert same(undone.state(), alone.state())


def test_without_a_loss_of_ones_own_the_guard_takes_that_of_the_last_batches() -> None:
    loop = Loop(MAMBA, {**HALVE, "max_loss_increase": 100.0, "calibration_batches": 2}).run()
    (event,) = loop.compressor.events
    reference = Loop(MAMBA, {**HALVE, "end": 100}, total_steps=101).run(2)
    with torch.no_grad():
        expected = [float(reference.model.eval()(**batch).loss) for batch in reference.batches[:2]]
    assert event.before == pytest.approx(sum(expected) / 2)
    assert event.outcome == "cut"


class Silent(nn.Module):
    """Returns what is no loss."""

    def __init__(self, takes: str = "") -> None:
        super().__init__()
        self.inner = own_layers()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens)["logits"]


class TwoInputs(Silent):
    def forward(self, tokens: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore
        return self.inner(tokens)["logits"]


def test_a_guard_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Silent is not given labels.*held_out_loss="):
        Compressor(Silent(), {**HALVE, "max_loss_increase": 0.1})
    with pytest.raises(ValueError, match="MambaModel is not given labels"):
        Compressor(MAMBA.build().backbone, {**HALVE, "max_loss_increase": 0.1})
    model = TwoInputs().train()
    compressor = Compressor(model, {**HALVE, "max_loss_increase": 0.1})
    model(LRU.batch()["input_ids"]).sum().backward()
    with pytest.raises(ValueError, match=r"TwoInputs returns none.*held_out_loss="):
        compressor.step()


@pytest.mark.parametrize(
    ("settings", "kwargs", "match"),
    [
        ({}, {}, r"end=0\.1 is a share.*total_steps="),
        ({"start": 0.1, "end": 20, "interval": 0.2}, {}, r"start=0\.1 and interval=0\.2 is a share"),
        ({**HALVE, "recovery_steps": 2, "metric_tolerance": 0.1}, {}, r"recovery_steps=2.*max_loss_increase="),
        (HALVE, {"total_steps": 0}, "total_steps must be a whole number"),
        (HALVE, {"total_steps": 2.5}, "total_steps must be a whole number"),
        (HALVE, {"total_steps": 2}, "No cut can happen"),
        (HALVE, {"calibration": {"input_ids": 1}}, r"Pass \[batch\]"),
        (HALVE, {"calibration": iter([])}, "used up by the first cut"),
        (HALVE, {"calibration": [{"input_ids": "text"}]}, "Calibration batch 1"),
        ({**HALVE, "criterion": "hankel"}, {}, "criterion"),
        (HALVE, {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(3))])}, r"1 parameter\(s\) that the model"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(settings: dict, kwargs: dict, match: str) -> None:
    model = MAMBA.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        Compressor(model, settings, **kwargs)
    assert same(snapshot(model), before)


def test_engines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"under nn\.DataParallel.*accelerator\.prepare"):
        Compressor(nn.DataParallel(MAMBA.build()), HALVE)


def test_settings_of_checkpoints_are_named_as_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.refusals.logger.warning", told.append)
    Loop(LRU, {**HALVE, "save_around_cuts": True})
    assert told == ["save_around_cuts has no effect in a loop of your own: save and load as you need."]


def test_a_loop_that_goes_around_the_forward_is_refused_after_its_first_step() -> None:
    loop = Loop(MAMBA)
    with pytest.raises(ValueError, match=r"without calling MambaForCausalLM.*calibration=loader"):
        loop.compressor.step()


def test_a_batch_that_cannot_be_run_again_is_refused_after_the_first_step() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = around_mamba()

        def forward(self, batches: Any) -> Any:
            return self.inner(next(batches))

    model = Once().train()
    compressor = Compressor(model, HALVE)
    model(iter([MAMBA.batch()["input_ids"]]))["logits"].sum().backward()
    with pytest.raises(ValueError, match=r"StopIteration.*the batch with which Once was called last"):
        compressor.step()


def test_settings_are_those_of_a_mapping_or_object() -> None:
    assert Loop(LRU, HALVE).compressor.config == CompreSSMConfig(**HALVE)
