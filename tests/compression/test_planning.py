"""Planning: rank rules, what stays untouched, and what is refused by name."""

import copy
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, analyze, plan_compression
from tests.family_table import (
    BAMBA,
    FAMILIES,
    LAYERS,
    LAYOUTS,
    LINEAR,
    LRU,
    MAMBA,
    S5,
    S5_CLASSIFIER,
    STATE_SIZE,
    Family,
    each,
    family_id,
    same,
    snapshot,
    ssm_layers,
)


RULES = [{"tolerance": 0.3}, {"max_error": 0.8}, {"fraction": 0.5}, {"target_state_size": 4}]
every_family = pytest.mark.parametrize("family", each(), ids=family_id)
linear_family = pytest.mark.parametrize("family", LINEAR, ids=family_id)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))


def sizes(family: Family, model: nn.Module | None = None, **settings: Any) -> list[int]:
    plan = plan_compression(model or family.build(), CompreSSMConfig(**settings), family.calibration())
    return [layer.new_state_size for layer in plan.layers]


@every_family
@pytest.mark.parametrize("training", [True, False])
def test_a_plan_touches_nothing(family: Family, training: bool) -> None:
    model = family.build().train(training)
    next(iter(ssm_layers(model).values())).eval()  # modes may differ from module to module
    model(**family.batch()).loss.backward()
    before, states = snapshot(model), (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002
    for criterion in family.criteria:
        assert analyze(model, CompreSSMConfig(fraction=0.5, criterion=criterion), family.calibration()).changes
    assert same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert same([*map(str, np.random.get_state())], [*map(str, states[2])])  # noqa: NPY002


def test_a_calibration_loader_that_draws_leaves_torch_random_numbers_alone() -> None:
    loader = torch.utils.data.DataLoader(torch.arange(40).reshape(10, 4) % 13, batch_size=2, shuffle=True)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for tokens in loader:
            yield {"input_ids": tokens}

    state = torch.get_rng_state()
    analyze(MAMBA.build(), None, batches())
    assert torch.equal(torch.get_rng_state(), state)


@every_family
@pytest.mark.parametrize("keep", ["largest", "random"])
def test_planning_twice_gives_the_same(family: Family, keep: str) -> None:
    model, config = family.build(), CompreSSMConfig(fraction=0.5, keep=keep)
    first = plan_compression(model, config, family.calibration())
    torch.rand(3)
    second = plan_compression(model, config, family.calibration())
    assert first.to_dict() == second.to_dict()
    for one, other in zip(first.layers, second.layers, strict=True):
        values = [[change.value for change in layer.cut.changes] for layer in (one, other)]
        assert same(*values)


@every_family
def test_a_plan_can_be_read_and_written(family: Family) -> None:
    plan = analyze(family.build(), CompreSSMConfig(fraction=0.5), family.calibration())
    written = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert [layer["new_state_size"] for layer in written["layers"]] == [STATE_SIZE // 2] * LAYERS
    for layer, entry in zip(plan.layers, written["layers"], strict=True):
        assert layer.name in str(plan)
        assert f"{STATE_SIZE} -> {STATE_SIZE // 2}" in str(plan)
        sigma = entry["hankel_singular_values"]
        assert sigma == sorted(sigma, reverse=True)
        assert sigma[-1] >= 0
        assert 0 < entry["energy_kept"] < 1
        assert entry["predicted_error"] > 0
        assert entry["error_bound"] is None
        assert (entry["status"], entry["criterion"]) == ("cut", family.criteria[0])


@linear_family
def test_a_cut_in_closed_form_has_a_bound(family: Family) -> None:
    plans = [
        analyze(family.build(), CompreSSMConfig(fraction=0.5)),
        analyze(family.build(), CompreSSMConfig(fraction=0.5, criterion="hankel"), family.calibration()),
        analyze(family.build(), CompreSSMConfig(fraction=0.5, realization="complex"), family.calibration()),
    ]
    for layer in (layer for plan in plans for layer in plan.layers):
        assert layer.criterion == "hankel"
        assert layer.error_bound > 0


@every_family
@every_rule
def test_every_rule_shrinks_to_a_size_that_the_family_allows(family: Family, rule: dict) -> None:
    found = sizes(family, **rule)
    assert all(1 <= size <= STATE_SIZE and size % family.granularity == 0 for size in found)
    assert family.per_layer or len(set(found)) == 1
    if "fraction" in rule or "target_state_size" in rule:
        assert found == [4, 4]


@pytest.mark.parametrize("family", LAYOUTS, ids=family_id)
@every_rule
@pytest.mark.parametrize("round_to", [3, 100])
def test_sizes_are_rounded_up_to_the_multiple_or_stay(family: Family, rule: dict, round_to: int) -> None:
    found = sizes(family, **rule, round_to=round_to)
    assert all(size == STATE_SIZE or size % round_to == 0 for size in found)
    assert all(rounded >= exact for rounded, exact in zip(found, sizes(family, **rule), strict=True))


@pytest.mark.parametrize("family", LAYOUTS, ids=family_id)
@every_rule
@pytest.mark.parametrize("minimum", [6, 50])
def test_no_layer_gets_smaller_than_the_minimum(family: Family, rule: dict, minimum: int) -> None:
    assert min(sizes(family, **rule, min_state_size=minimum)) >= min(minimum, STATE_SIZE)


@every_family
@pytest.mark.parametrize("rule", [{"tolerance": 0.0}, {"max_error": 0.0}, {"target_state_size": STATE_SIZE}])
def test_rules_that_ask_for_nothing_change_nothing(family: Family, rule: dict) -> None:
    plan = plan_compression(family.build(), CompreSSMConfig(**rule), family.calibration())
    assert not plan.changes
    assert {(layer.status, layer.new_state_size, layer.energy_kept) for layer in plan.layers} == {
        ("kept", STATE_SIZE, 1.0)
    }
    assert all(layer.reason for layer in plan.layers)


@every_family
def test_sizes_fall_with_the_tolerance(family: Family) -> None:
    model = family.build()
    found = [sizes(family, model, tolerance=t, min_reduction=0) for t in (0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999)]
    assert all(a >= b for one, other in pairwise(found) for a, b in zip(one, other, strict=True))
    assert found[0] == [STATE_SIZE] * LAYERS
    assert max(found[-1]) < STATE_SIZE


@every_family
def test_the_gate_holds_back_small_cuts_of_the_error_rules_only(family: Family) -> None:
    model = family.build()
    wanted = sizes(family, model, tolerance=0.6, min_reduction=0)
    share = max(1 - size / STATE_SIZE for size in wanted)
    assert sizes(family, model, tolerance=0.6, min_reduction=min(share + 0.01, 0.99)) == [STATE_SIZE] * LAYERS
    assert sizes(family, model, target_state_size=6, min_reduction=0.9) == [6] * LAYERS


@linear_family
def test_the_error_rule_is_a_guarantee_in_closed_form(family: Family) -> None:
    plan = plan_compression(family.build(torch.float64), CompreSSMConfig(max_error=0.9, min_reduction=0))
    for layer in plan.layers:
        if layer.status == "cut" and layer.error_bound is not None:
            slack = 2**0.5 if family.variant.get("bidirectional") else 1.0
            assert layer.error_bound <= 0.9 * slack * float(layer.hankel_singular_values[0]) * (1 + 1e-9)


@linear_family
@pytest.mark.parametrize(
    ("criterion", "realization"), [("hankel", "real"), ("hankel", "complex"), ("empirical", "real")]
)
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_no_cut_discards_more_energy_than_the_tolerance(
    family: Family, criterion: str, realization: str, tolerance: float
) -> None:
    settings = {"criterion": criterion, "realization": realization, "tolerance": tolerance, "min_reduction": 0}
    for seed in range(3):  # real eigenvalues, which take slots of their own, come and go
        model = family.build(torch.float64, seed=seed, state_size=16)
        plan = plan_compression(model, CompreSSMConfig(**settings), family.calibration(dtype=torch.float64))
        assert all(layer.energy_kept >= 1 - tolerance - 1e-12 for layer in plan.layers)


@linear_family
def test_one_size_for_all_is_the_largest_that_any_layer_asks_for(family: Family) -> None:
    model = family.build()
    with torch.no_grad():  # one layer that needs little, one that needs much
        first = next(iter(ssm_layers(model).values()))
        first.B_re[2:] *= 1e-6
        first.B_im[2:] *= 1e-6
    free = sizes(family, model, tolerance=0.2, min_reduction=0, criterion="hankel")
    assert free[0] < free[1]
    shared = sizes(family, model, tolerance=0.2, min_reduction=0, criterion="hankel", per_layer=False)
    assert shared == [max(free)] * LAYERS


@linear_family
@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({"layers": ["layers.0.ssm"]}, [0]),
        ({"layers": ["*.1.ssm"]}, [1]),
        ({"layers": ["*"], "ignore_layers": ["layers.1.ssm"]}, [0]),
        ({"ignore_layers": ["*layers.0*"]}, [1]),
        ({"layers": ["ssm"]}, [0, 1]),
    ],
)
def test_layers_are_picked_by_name_and_pattern(family: Family, settings: dict, cut: list[int]) -> None:
    plan = plan_compression(family.build(), CompreSSMConfig(fraction=0.5, **settings))
    assert [layer.name for layer in plan.layers] == [f"backbone.layers.{index}.ssm" for index in cut]


@linear_family
def test_a_layer_that_cannot_be_cut_holds_back_the_others_where_sizes_are_shared(family: Family) -> None:
    model = family.build()
    next(iter(ssm_layers(model).values())).C_re.data[0, 0] = torch.nan
    free = plan_compression(model, CompreSSMConfig(fraction=0.5))
    assert [layer.status for layer in free.layers] == ["skipped", "cut"]
    shared = plan_compression(model, CompreSSMConfig(fraction=0.5, per_layer=False))
    assert not shared.changes


CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "|lambda| = 1": (LRU, {"nu_log": -torch.inf}),
    "NaN step": (S5, {"log_step": torch.nan}),
    "infinite step": (S5, {"log_step": torch.inf}),
    "zero step": (S5, {"log_step": -torch.inf}),
    "growing state": (S5, {"Lambda_re": 1.0}),
    **{
        f"{family.name} {name} {value}": (family, {name: value})
        for value in (torch.nan, torch.inf, -torch.inf)
        for family, names in (
            (LRU, ("nu_log", "theta", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D")),
            (S5_CLASSIFIER, ("Lambda_re", "Lambda_im", "log_step", "B_re", "C_im", "D")),
            (
                MAMBA,
                ("A_log", "D", "x_proj.weight", "dt_proj.bias", "in_proj.weight", "conv1d.weight", "out_proj.weight"),
            ),
        )
        for name in names
        if not (name == "nu_log" and value == -torch.inf)
    },
}


@pytest.mark.parametrize(("family", "broken"), CHANGES.values(), ids=CHANGES.keys())
def test_a_broken_layer_is_skipped_with_its_reason_or_raised(family: Family, broken: dict) -> None:
    model = family.build()
    layer = list(ssm_layers(model).values())[1]
    for name, value in broken.items():
        layer.get_parameter(name).data.flatten()[0] = value
    before = snapshot(model)
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5), family.calibration())
    last = plan.layers[1]
    assert (last.status, last.new_state_size) == ("skipped", STATE_SIZE)
    assert "non-finite" in last.reason or "unstable" in last.reason
    assert plan.layers[0].status == ("cut" if family.per_layer else "kept")
    assert last.name in str(plan)
    if "non-finite" in last.reason:
        with pytest.raises(ValueError, match=rf"{last.name}.*on_nonfinite='skip'"):
            plan_compression(model, CompreSSMConfig(fraction=0.5, on_nonfinite="raise"), family.calibration())
    assert same(snapshot(model), before)


@linear_family
@pytest.mark.parametrize("matrix", ["B", "C"])
def test_a_silent_layer_is_left_alone(family: Family, matrix: str) -> None:
    model = family.build()
    for layer in ssm_layers(model).values():
        for part in ("re", "im"):
            getattr(layer, f"{matrix}_{part}").data.zero_()
    for criterion in family.criteria:
        plan = plan_compression(model, CompreSSMConfig(fraction=0.5, criterion=criterion), family.calibration())
        assert [(layer.status, layer.reason) for layer in plan.layers] == [("skipped", "no output energy")] * LAYERS


def test_a_silent_mamba_layer_is_left_alone() -> None:
    model = MAMBA.build()
    for layer in ssm_layers(model).values():
        layer.out_proj.weight.data.zero_()
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    assert {layer.reason for layer in plan.layers} == {"no output energy"}


def refused(family: Family, settings: dict, calibration: Any, match: str) -> None:
    model = family.build()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        plan_compression(model, CompreSSMConfig(**settings), calibration)
    assert same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), state)


@every_family
def test_a_target_above_the_present_size_is_refused(family: Family) -> None:
    refused(family, {"target_state_size": 9}, family.calibration(), r"target_state_size=9.*8")


@every_family
def test_a_criterion_of_other_families_is_refused(family: Family) -> None:
    foreign = "interpolative" if family.is_linear else "hankel"
    refused(family, {"criterion": foreign}, family.calibration(), rf"{foreign}.*{family.family}.*ignore_layers")


@every_family
def test_patterns_that_match_nothing_are_refused(family: Family) -> None:
    refused(family, {"layers": ["nowhere"]}, family.calibration(), r"nowhere.*(layers|blocks)\.0")
    refused(family, {"ignore_layers": ["*"]}, family.calibration(), r"ignore_layers.*(layers|blocks)\.0")


def test_a_size_per_layer_is_refused_where_the_class_has_one() -> None:
    refused(BAMBA, {"per_layer": True}, BAMBA.calibration(), r"per_layer=True.*BambaForCausalLM.*per_layer=False")


def test_picking_layers_is_refused_where_the_class_has_one_size() -> None:
    refused(MAMBA, {"layers": ["layers.0.mixer"]}, MAMBA.calibration(), r"pick 1 of 2")


@pytest.mark.parametrize(
    ("family", "criterion"), [(MAMBA, "auto"), (MAMBA, "surrogate"), (LRU, "empirical"), (S5, "empirical")]
)
@pytest.mark.parametrize("calibration", [None, [], iter(())], ids=["none", "empty", "used up"])
def test_missing_calibration_is_refused(family: Family, criterion: str, calibration: Any) -> None:
    refused(family, {"criterion": criterion}, calibration, "calibration.*(DataLoader|generator)")


def test_closed_form_layers_need_no_calibration_and_take_no_batch() -> None:
    def poison() -> Iterator[dict]:
        yield pytest.fail("a batch was drawn")

    assert plan_compression(LRU.build(), CompreSSMConfig(fraction=0.5)).changes
    assert plan_compression(LRU.build(), CompreSSMConfig(fraction=0.5, criterion="hankel"), poison()).changes


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([MAMBA.batch(), (1, 2)], "batch 2 cannot be used: "),
        ([[{"prompt": "a"}, {"prompt": "b"}]], "batch 1 cannot be used: .* a list of examples that are not collated"),
        (["words"], "batch 1 cannot be used: .* a str; a dict of model inputs is needed"),
        ([{"input_ids": torch.zeros(2, 3)}], r"batch 1 with \{'input_ids': \(2, 3\)\} cannot be used: "),
        ([{"input_ids": torch.full((2, 3), 99)}], "batch 1 with .* cannot be used: "),
        ([{"nonsense": torch.zeros(2, 3)}], "batch 1 with .* cannot be used: "),
        ([{}], "batch 1 with .* cannot be used: "),
        (MAMBA.batch(), r"calibration is a single dict \(with input_ids.*Pass \[batch\]"),
        (torch.zeros(2, 3, dtype=torch.long), "calibration is a Tensor; it must be an iterable of dicts"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batches: list, match: str) -> None:
    refused(MAMBA, {}, batches, match)


def test_a_non_finite_calibration_batch_skips_the_layers() -> None:
    batch = S5_CLASSIFIER.batch()
    batch["input_values"][0, 0, 0] = torch.nan
    plan = plan_compression(S5_CLASSIFIER.build(), CompreSSMConfig(fraction=0.5, criterion="empirical"), [batch])
    assert {layer.status for layer in plan.layers} == {"skipped"}
    assert all("non-finite" in layer.reason for layer in plan.layers)


def test_a_model_without_state_space_layers_is_refused() -> None:
    names = r".*\b".join(sorted(family.family for family in FAMILIES if family.name == family.family))
    with pytest.raises(ValueError, match=rf"Sequential has no SSM layer.*\b{names}\b.*CONTRIBUTING"):
        analyze(nn.Sequential(nn.Linear(2, 2)))


def test_a_hybrid_without_state_space_layers_is_refused() -> None:
    model = BAMBA.build(attn_layer_indices=[0, 1, 2])
    with pytest.raises(ValueError, match=r"BambaForCausalLM has no SSM layer.*nemotron_h.*CONTRIBUTING"):
        analyze(model, calibration=BAMBA.calibration())


@every_family
def test_one_state_cannot_shrink(family: Family) -> None:
    if family.granularity > 1:
        model = family.build(state_size=2)
    else:
        model = family.build(state_size=1)
    for rule in ({"tolerance": 0.9}, {"fraction": 0.9}, {"target_state_size": 1}):
        assert not plan_compression(model, CompreSSMConfig(**rule), family.calibration()).changes


@every_family
def test_random_order_depends_on_the_seed_and_on_no_generator(family: Family) -> None:
    model = family.build(state_size=32)

    def kept(seed: int) -> list[torch.Tensor]:
        torch.rand(1)
        config = CompreSSMConfig(fraction=0.5, keep="random", seed=seed)
        return [layer.cut.changes[0].value for layer in plan_compression(model, config, family.calibration()).layers]

    assert same(kept(1), kept(1))
    assert not same(kept(1), kept(2))


@every_family
def test_keeping_the_largest_is_predicted_best(family: Family) -> None:
    model = family.build(family.widest, state_size=16)
    for criterion in family.criteria:
        found = {}
        for keep in ("largest", "smallest", "random"):
            config = CompreSSMConfig(target_state_size=8, keep=keep, criterion=criterion, refit_steps=0)
            plan = plan_compression(model, config, family.calibration(dtype=family.widest))
            found[keep] = [
                (sum(getattr(layer, x) for layer in plan.layers)) for x in ("predicted_error", "energy_kept")
            ]
        assert found["largest"][0] < min(found["smallest"][0], found["random"][0])
        if family.is_linear:  # of a selection, the energy is that of the size alone
            assert found["largest"][1] > max(found["random"][1], found["smallest"][1])


def test_a_plan_does_not_keep_a_copy_of_the_model_alive_in_its_dict() -> None:
    model = copy.deepcopy(LRU.build())
    plan = analyze(model, CompreSSMConfig(fraction=0.5)).without_tensors()
    assert all(layer.cut is None and layer.layer is None for layer in plan.layers)
    assert plan.changes
