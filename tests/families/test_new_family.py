"""The checklist for a new family in CONTRIBUTING.md, followed literally for a toy layer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.families import registry
from tests.compression import test_applying as laws_of_a_cut
from tests.family_table import Family, outputs, snapshot
from tests.surgery import test_optimizer as laws_of_moments
from tests.training import test_loading as laws_of_resuming


CLOSE = 0.5
"""How far the error of logits may lie from the predicted error of a layer: another layer and a head stand between."""


@pytest.fixture(scope="module")
def toy() -> Iterator[Family]:
    """The file, whose import is the registration, and the row of the table."""
    before = dict(registry._FAMILIES)
    from tests.families.toy import ToyConfig, ToyForCausalLM

    yield Family("toy", "toy", ToyForCausalLM, ToyConfig, criteria=("selection",), per_layer=False)
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)


def test_the_file_registers_it(toy: Family) -> None:
    assert "toy" in registry.registered_families()
    plan = analyze(toy.build(), CompreSSMConfig(fraction=0.5))
    assert [(layer.family, layer.new_state_size) for layer in plan.layers] == [("toy", 4), ("toy", 4)]


def test_full_rank_changes_nothing(toy: Family) -> None:
    model = toy.build()
    before = snapshot(model)
    assert not compress(model, CompreSSMConfig(tolerance=0)).changed
    assert snapshot(model).keys() == before.keys()


def test_the_error_is_near_the_predicted_one(toy: Family) -> None:
    model, batch = toy.build(torch.float64), toy.batch(8, 64)
    before = outputs(model, batch)
    result = compress(model, CompreSSMConfig(fraction=0.25))
    error = float((outputs(model, batch) - before).norm() / before.norm())
    predicted = max(layer.predicted_error for layer in result.plan.layers)
    assert 0 < error < 1
    assert abs(error - predicted) < CLOSE


def test_the_laws_of_all_families_run_on_it(toy: Family, tmp_path: Path) -> None:
    laws_of_a_cut.test_a_cut_sets_every_size_and_the_record(toy)
    laws_of_a_cut.test_saved_and_loaded_again_the_model_is_the_same(toy, tmp_path / "saved")
    laws_of_a_cut.test_parameters_keep_their_dtype_and_the_model_runs(toy, torch.bfloat16)
    laws_of_a_cut.test_a_plan_is_applied_once(toy)
    laws_of_a_cut.test_the_old_tensors_are_freed_once_the_result_is_all_that_is_left(toy)
    laws_of_a_cut.test_a_copy_and_a_gate_that_blocks_leave_the_model_bit_equal(toy)
    laws_of_resuming.test_every_family_resumes_after_its_cut_into_a_model_of_the_original_size(toy, tmp_path / "run")


def test_its_moments_follow(toy: Family) -> None:
    laws_of_moments.test_a_reset_drops_the_state_of_cut_parameters_only(toy)
    laws_of_moments.test_frozen_parameters_stay_frozen_and_outside(toy)
    laws_of_moments.test_marks_and_hooks_survive(toy)
