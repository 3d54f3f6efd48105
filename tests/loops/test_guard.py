"""A cut that hurts is taken back bit for bit, and a gentler one is tried."""

from dataclasses import replace

import pytest
import torch

from hf_compressm import CompreSSMConfig
from hf_compressm.compression import CutRequest
from hf_compressm.loops.guard import guarded_cut
from tests.family_table import (
    LRU,
    MAMBA,
    Family,
    each,
    family_id,
    same,
    snapshot,
    train_step,
)
from tests.states import everything


class Losses:
    """Stands for a held-out loss: gives one value after the other, and remembers the sizes that it saw."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self) -> float:
        return self.values.pop(0)


@pytest.mark.parametrize("compat", ["stock", "best"])
@pytest.mark.parametrize("family", each(), ids=family_id)
def test_an_undone_cut_leaves_no_trace(family: Family, compat: str) -> None:
    model = family.build(state_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, optimizer, family.batch())
    before = everything(model, optimizer)
    config = CompreSSMConfig(fraction=0.75, compat=compat, max_loss_increase=0.1, max_retries=0)
    (event,) = guarded_cut(model, CutRequest(config, family.calibration(), optimizer, 3), Losses(1.0, 1.2))
    assert (event.outcome, event.before, event.after) == ("undone", 1.0, 1.2)
    assert event.result.state_sizes_after != event.sizes == event.result.state_sizes_before
    assert same(everything(model, optimizer), before)
    train_step(model, optimizer, family.batch())


@pytest.mark.parametrize("after", [1.2, float("nan"), float("inf")])
def test_each_retry_takes_half_of_the_reduction(after: float) -> None:
    model = MAMBA.build(state_size=16)
    config = CompreSSMConfig(target_state_size=4, max_loss_increase=0.1, max_retries=2)
    events = guarded_cut(model, CutRequest(config, MAMBA.calibration(), None, 0), Losses(1.0, after, after, 1.05))
    assert [event.outcome for event in events] == ["undone", "undone", "cut"]
    assert [event.attempt for event in events] == [1, 2, 3]
    assert [set(event.result.state_sizes_after.values()) for event in events] == [{4}, {10}, {13}]
    assert model.config.state_size == 13
    assert len(model.config.compressm["cuts"]) == 1


def test_each_retry_ends_at_an_allowed_size() -> None:
    model = MAMBA.build(state_size=16)
    config = CompreSSMConfig(target_state_size=4, sizes=[4, 12, 14], max_loss_increase=0.1, max_retries=2)
    events = guarded_cut(model, CutRequest(config, MAMBA.calibration(), None, 0), Losses(1.0, 1.2, 1.2, 1.05))
    assert [set(event.result.state_sizes_after.values()) for event in events] == [{4}, {12}, {14}]
    assert model.config.state_size == 14


def test_the_guard_gives_up_after_its_retries() -> None:
    model = LRU.build()
    before = snapshot(model)
    config = CompreSSMConfig(target_state_size=2, max_loss_increase=0.0, max_retries=1)
    events = guarded_cut(model, CutRequest(config, LRU.calibration(), None, 0), Losses(1.0, 2.0, 1.5))
    assert [event.outcome for event in events] == ["undone", "undone"]
    assert same(snapshot(model), before)


def test_a_guard_that_fails_leaves_the_model_as_it_was() -> None:
    def fails() -> float:
        if model.config.state_size < 8:
            raise KeyboardInterrupt
        return 1.0

    model = LRU.build()
    optimizer = torch.optim.AdamW(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        guarded_cut(model, CutRequest(CompreSSMConfig(fraction=0.5, max_loss_increase=1.0), None, optimizer, 0), fails)
    assert same(everything(model, optimizer), before)


def test_nothing_is_cut_where_the_loss_is_not_finite_before() -> None:
    model = LRU.build()
    before = snapshot(model)
    config = CompreSSMConfig(fraction=0.5, max_loss_increase=1.0)
    (event,) = guarded_cut(model, CutRequest(config, LRU.calibration(), None, 0), Losses(float("nan")))
    assert event.outcome == "unchanged"
    assert "held-out loss is nan" in event.result.plan.layers[0].reason
    assert same(snapshot(model), before)
    config = replace(config, on_nonfinite="raise")
    with pytest.raises(ValueError, match="held-out loss is nan"):
        guarded_cut(model, CutRequest(config, LRU.calibration(), None, 0), Losses(float("nan")))
