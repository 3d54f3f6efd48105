"""NaN and infinity wherever they may be: no cut, the model bit for bit as before, and the reason in the history."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback

from hf_compressm import CompreSSMConfig, compress
from tests.family_table import (
    BAMBA,
    FAMILIES,
    LRU,
    MAMBA,
    MAMBA2,
    S5_CLASSIFIER,
    Family,
    family_id,
    owner_of_a_cut_parameter,
    same,
    snapshot,
    ssm_layers,
    train_step,
)
from tests.trainers import callback_of, trainer_of


bad_value = pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)


def broken(family: Family, where: str, value: float) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Model, optimizer and calibration data, with one bad number in every layer, or in the data."""
    model, calibration = family.build(), family.calibration()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, family.batch())
    model.eval()
    owners = [owner_of_a_cut_parameter(layer) for layer in ssm_layers(model).values()]
    parameters = [getattr(owner, name) for owner, name in owners]
    if where == "parameter":
        for parameter in parameters:
            parameter.data.flatten()[0] = value
    elif where in ("exp_avg", "exp_avg_sq"):
        for parameter in parameters:
            optimizer.state[parameter][where].fill_(value)
    elif family.is_language_model:  # tokens have no NaN; what they are embedded as has
        with torch.no_grad():
            embedded = model.get_input_embeddings()(calibration[1]["input_ids"])
        embedded[0, 0, 0] = value
        calibration[1] = {"inputs_embeds": embedded}
    else:
        calibration[1]["input_values"][0, 0, 0] = value
    return model, optimizer, calibration


CASES = [
    *[(family, "parameter", torch.nan) for family in FAMILIES],
    *[(family, "exp_avg", torch.inf) for family in (LRU, S5_CLASSIFIER, MAMBA, MAMBA2, BAMBA)],
    *[(family, "exp_avg_sq", torch.nan) for family in (LRU, S5_CLASSIFIER, MAMBA, MAMBA2, BAMBA)],
]


@pytest.mark.parametrize(("family", "where", "value"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_number_that_is_none_skips_the_cut_with_its_reason_or_raises(
    family: Family, where: str, value: float
) -> None:
    check(family, where, value)


@bad_value
@pytest.mark.parametrize("family", [MAMBA, MAMBA2, S5_CLASSIFIER, LRU], ids=family_id)
def test_a_calibration_batch_with_such_a_number_does_too(family: Family, value: float) -> None:
    check(family, "batch", value, criterion="empirical" if family.is_linear else "auto")


def check(family: Family, where: str, value: float, **settings: Any) -> None:
    model, optimizer, calibration = broken(family, where, value)
    before, moments = snapshot(model), {id(p): dict(state) for p, state in optimizer.state.items()}
    result = compress(model, CompreSSMConfig(fraction=0.5, **settings), calibration, optimizer)
    assert not result.changed
    assert result.state_sizes_after == result.state_sizes_before
    assert "skipped" in {layer.status for layer in result.plan.layers}
    assert all("finite" in layer.reason for layer in result.plan.layers if layer.status == "skipped")
    with pytest.raises(ValueError, match=r"finite"):
        compress(model, CompreSSMConfig(fraction=0.5, on_nonfinite="raise", **settings), calibration, optimizer)
    assert same(snapshot(model), before)
    assert same({id(p): dict(state) for p, state in optimizer.state.items()}, moments)


class Break(TrainerCallback):
    """Puts a bad number where it is told to, after a step."""

    def __init__(self, where: str, value: float, step: int) -> None:
        self.where, self.value, self.step = where, value, step
        self.before: dict[str, Any] = {}
        self.same: bool | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for layer in ssm_layers(kwargs["model"]).values():
                owner, name = owner_of_a_cut_parameter(layer)
                parameter = getattr(owner, name)
                moments = kwargs["optimizer"].state[parameter]
                (parameter.data if self.where == "parameter" else moments[self.where]).flatten()[0] = self.value
            self.before = snapshot(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:  # comes after the cut: this callback is the later one
            self.same = same(snapshot(kwargs["model"]), self.before)


@pytest.mark.parametrize("where", ["parameter", "exp_avg"])
@pytest.mark.parametrize("family", [LRU, MAMBA, MAMBA2], ids=family_id)
def test_a_run_logs_that_nothing_was_cut_and_why(family: Family, where: str, tmp_path: Path) -> None:
    breaks = Break(where, torch.nan, 2)
    trainer = trainer_of(family, tmp_path, callbacks=[breaks], max_steps=4)
    trainer.train()
    (event,) = callback_of(trainer).events
    assert (event.step, event.outcome) == (2, "unchanged")
    assert breaks.same
    assert any("finite" in layer.reason for layer in event.result.plan.layers)
    (logged,) = [entry for entry in trainer.state.log_history if "compressm/cut" in entry]
    assert logged["compressm/cut"] == 0
    assert logged["compressm/skipped_layers"] >= 1


@pytest.mark.parametrize("family", [LRU, MAMBA], ids=family_id)
def test_a_run_that_asks_for_it_stops(family: Family, tmp_path: Path) -> None:
    settings = {"fraction": 0.5, "end": 2, "num_cuts": 1, "on_nonfinite": "raise"}
    trainer = trainer_of(family, tmp_path, settings, callbacks=[Break("parameter", torch.inf, 2)], max_steps=4)
    with pytest.raises(ValueError, match="finite"):
        trainer.train()


@pytest.mark.parametrize("overflow", ["before the cut", "after the cut", "at both"])
@pytest.mark.parametrize("family", [LRU, MAMBA], ids=family_id)
def test_a_step_that_the_gradient_scaler_skips_beside_a_cut_is_only_skipped(family: Family, overflow: str) -> None:
    model = family.build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inner = torch.optim.AdamW(model.parameters())
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)

    def step(overflows: bool) -> bool:
        """One step; whether the scaler skipped it."""
        model.train()
        scaler.scale(model(**family.batch()).loss).backward()
        if overflows:
            next(iter(inner.param_groups[0]["params"])).grad.fill_(torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.step_was_skipped

    assert not step(False)
    assert step(overflow != "after the cut") is (overflow != "after the cut")
    steps = {name: float(inner.state[p]["step"]) for name, p in model.named_parameters()}
    assert compress(model, CompreSSMConfig(fraction=0.5), family.calibration(), optimizer).changed
    assert {name: float(inner.state[p]["step"]) for name, p in model.named_parameters()} == steps
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    skipped = overflow != "before the cut"
    assert step(skipped) is skipped
    assert all(torch.equal(p, values[name]) is skipped for name, p in model.named_parameters())
    assert not step(False)
    for name, parameter in model.named_parameters():
        state = inner.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert torch.isfinite(state["exp_avg"]).all()
        assert torch.isfinite(state["exp_avg_sq"]).all()
        assert float(state["step"]) == steps[name] + (1 if skipped else 2)


@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad of everything it meets
@pytest.mark.parametrize("family", [LRU, pytest.param(MAMBA2, marks=pytest.mark.slow)], ids=family_id)
def test_a_compiled_model_keeps_training_after_each_of_two_cuts(family: Family) -> None:
    torch.compiler.reset()
    model = family.build()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    for size in (8, 5 if family is MAMBA2 else 6, 4):
        compress(model, CompreSSMConfig(target_state_size=size), family.calibration(), optimizer)
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_step(compiled, optimizer, family.batch())
        assert not any(torch.equal(p, values[name]) for name, p in model.named_parameters())
