"""A cut is taken back bit for bit, and one that fails half-way leaves nothing behind."""

import gc
import weakref
from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig, apply_plan, compress, plan_compression
from hf_compressm.surgery import Snapshot, operation
from tests.family_table import (
    BAMBA,
    FAMILIES,
    LRU,
    MAMBA,
    MAMBA2,
    MAMBA2_PLAIN,
    Family,
    each,
    family_id,
    outputs,
    same,
    snapshot,
    ssm_layers,
    train_step,
)


every_family = pytest.mark.parametrize("family", each(), ids=family_id)
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {"target_state_size": 4},
    "best": {"target_state_size": 4, "compat": "best"},
    "per layer": {"tolerance": 0.3, "compat": "best", "min_reduction": 0},
    "reset": {"fraction": 0.5, "optimizer_state": "reset"},
}


def trained(family: Family) -> tuple[Any, Any]:
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    train_step(model, optimizer, family.batch())
    return model, optimizer


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """All that a cut may change, values and identities."""
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    moments = {
        id(p): {k: v.clone() if hasattr(v, "clone") else v for k, v in s.items()} for p, s in optimizer.state.items()
    }
    return {
        **snapshot(model),
        "classes": [type(module).__name__ for module in model.modules()],
        "config class": type(model.config).__name__,
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "parameters": [sorted(module._parameters) for module in model.modules()],
        "groups": groups,
        "moments": moments,
    }


CASES = [
    *[pytest.param(family, SETTINGS["stock"], id=family.name) for family in FAMILIES],
    *[
        pytest.param(family, SETTINGS[name], id=f"{family.name} {name}")
        for family in (MAMBA, MAMBA2, MAMBA2_PLAIN, LRU)
        for name in ("best", "per layer", "reset")
    ],
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_everything_comes_back(family: Family, settings: dict) -> None:
    model, optimizer = trained(family)
    before, saved = state_of(model, optimizer), Snapshot(model, optimizer)
    compress(model, CompreSSMConfig(**settings), family.calibration(), optimizer)
    saved.restore()
    assert same(state_of(model, optimizer), before)
    expected = outputs(model.eval(), family.batch())
    train_step(model, optimizer, family.batch())
    assert not torch.equal(outputs(model.eval(), family.batch()), expected)


def test_two_cuts_are_taken_back_by_the_first_snapshot() -> None:
    model, optimizer = trained(MAMBA2)
    before, saved = state_of(model, optimizer), Snapshot(model, optimizer)
    for size in (5, 3):
        compress(model, CompreSSMConfig(target_state_size=size, compat="best"), MAMBA2.calibration(), optimizer)
    saved.restore()
    assert same(state_of(model, optimizer), before)


FAILURES = {
    "commit_optimizer": RuntimeError("no"),
    "refuse_stale_caches": ValueError("no"),
    "commit_replacements": MemoryError(),
    "commit_optimizer, interrupted": KeyboardInterrupt(),
}


@pytest.mark.parametrize(
    ("family", "compat"),
    [(LRU, "stock"), (BAMBA, "stock"), (MAMBA, "stock"), (MAMBA, "best"), (MAMBA2, "best"), (MAMBA2_PLAIN, "best")],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize(("place", "error"), FAILURES.items(), ids=FAILURES)
def test_a_plan_that_fails_half_way_leaves_all_as_before(
    family: Family, compat: str, place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(family)
    plan = plan_compression(model, CompreSSMConfig(target_state_size=4, compat=compat), family.calibration())
    before, name = state_of(model, optimizer), place.split(",")[0]
    original = getattr(operation, name)

    def fail(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(operation, name, fail)
        with pytest.raises(type(error)):
            apply_plan(model, plan, optimizer)
    assert same(state_of(model, optimizer), before)
    assert apply_plan(model, plan, optimizer).changed


@pytest.mark.parametrize("family", [MAMBA, MAMBA2, LRU], ids=family_id)
def test_the_old_tensors_are_freed_with_the_snapshot_that_holds_them(family: Family) -> None:
    model, optimizer = trained(family)
    saved = Snapshot(model, optimizer)
    before = {id(p) for p in model.parameters()}
    old = [weakref.ref(p) for layer in ssm_layers(model).values() for p in layer.parameters()]
    result = compress(model, CompreSSMConfig(target_state_size=4), family.calibration(), optimizer)
    alive = {id(p) for p in model.parameters()}
    gc.collect()
    assert all(reference() is not None for reference in old)
    del saved, result
    gc.collect()
    assert any(reference() is None for reference in old)
    assert all(reference() is None or id(reference()) in alive & before for reference in old)
