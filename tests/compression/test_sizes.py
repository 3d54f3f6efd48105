"""A list of allowed sizes, with every rule and beside every other condition."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, compress, plan_compression
from hf_compressm.families import find_layers
from tests.family_table import LAYOUTS, LRU, MAMBA, MAMBA2, QWEN3_NEXT, S5, STATE_SIZE, Family, family_id, ssm_layers


RULES = [{"tolerance": 0.3}, {"max_error": 0.8}, {"fraction": 0.5}, {"target_state_size": 3}]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))


def sizes(family: Family, share: float = 1.0, model: nn.Module | None = None, **settings: Any) -> list[int]:
    config = CompreSSMConfig(**settings)
    plan = plan_compression(model or family.build(), config, family.calibration(), reduction_share=share)
    return [layer.new_state_size for layer in plan.layers]


@pytest.mark.parametrize("family", LAYOUTS, ids=family_id)
@every_rule
def test_a_cut_ends_at_the_smallest_allowed_size_that_the_rule_permits(family: Family, rule: dict) -> None:
    model = family.build(n_groups=1) if family is MAMBA2 else family.build()
    exact = sizes(family, model=model, **rule, min_reduction=0)
    found = sizes(family, model=model, **rule, min_reduction=0, sizes=[2, 4, 6, 64])
    for wanted, size in zip(exact, found, strict=True):
        assert size == min(each for each in (2, 4, 6, STATE_SIZE) if each >= wanted)


def test_groups_are_no_special_case() -> None:
    model = MAMBA2.build(n_groups=2)
    assert sizes(MAMBA2, model=model, fraction=0.5, sizes="3,5") == [5, 5]
    assert compress(model, CompreSSMConfig(fraction=0.5, sizes="3,5"), MAMBA2.calibration()).changed
    assert model.config.state_size == 5
    assert model(**MAMBA2.batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"round_to": 4}, 4),
        ({"min_state_size": 5}, 6),
        ({"round_to": 3, "min_state_size": 4}, 6),
        ({"fraction": 0.1}, STATE_SIZE),
    ],
)
def test_a_size_fits_every_setting_at_once(settings: dict[str, Any], expected: int) -> None:
    assert sizes(MAMBA, **{"fraction": 0.7, "sizes": [3, 4, 6]} | settings) == [expected] * 2


def test_a_size_fits_the_layer_too() -> None:
    assert sizes(S5, fraction=0.7, sizes=[3, 5, 6]) == [6, 6]  # conjugate pairs
    with pytest.raises(
        ValueError, match=r"sizes=\[3, 5\] suits .*ssm: of this s5 layer .* multiples of 2.*ignore_layers"
    ):
        sizes(S5, fraction=0.7, sizes=[3, 5])


def test_a_target_that_is_not_listed_becomes_the_next_larger_one_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.compression.choices.logger.warning_once", told.append)
    assert sizes(MAMBA, target_state_size=5, sizes=[4, 6]) == [6, 6]
    assert sizes(MAMBA, target_state_size=4, sizes=[4, 6]) == [4, 4]
    assert len(told) == 1
    assert "target_state_size=5 is not among sizes=[4, 6]" in told[0]
    assert sizes(MAMBA, target_state_size=7, sizes=[4, 6]) == [STATE_SIZE] * 2


@pytest.mark.parametrize("rule", [{"target_state_size": 2}, {"tolerance": 0.5}])
def test_a_layer_below_all_sizes_stays_and_says_why(rule: dict) -> None:
    plan = plan_compression(MAMBA.build(), CompreSSMConfig(**rule, sizes="serving"), MAMBA.calibration())
    for layer in plan.layers:
        assert (layer.status, layer.new_state_size) == ("kept", STATE_SIZE)
        assert "none of sizes=[64, 96, 128, 256] that it may have is below its present size" in layer.reason


def test_a_gentler_cut_ends_at_an_allowed_size() -> None:
    settings = {"target_state_size": 2, "sizes": [2, 4, 6]}
    found = [sizes(MAMBA, share, **settings)[0] for share in (1.0, 0.75, 0.5, 0.25, 0.1)]
    assert found == [2, 4, 6, STATE_SIZE, STATE_SIZE]


def test_the_gate_judges_the_rounded_size() -> None:
    settings: dict[str, Any] = {"tolerance": 0.9, "sizes": [6]}
    assert sizes(LRU, **settings, min_reduction=0.25) == [6, 6]
    assert sizes(LRU, **settings, min_reduction=0.26) == [STATE_SIZE] * 2


def test_layers_of_several_sizes_that_share_one_get_an_allowed_one() -> None:
    model = LRU.build()
    first = next(iter(ssm_layers(model)))
    compress(model, CompreSSMConfig(target_state_size=5, layers=[first]))
    assert sizes(LRU, model=model, fraction=0.5, sizes=[4, 6], per_layer=False) == [4, 4]
    assert sizes(LRU, model=model, fraction=0.5, sizes=[3, 6], per_layer=False) == [5, 6]


def test_layers_whose_cuts_are_tried_try_allowed_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = QWEN3_NEXT.build(), set()
    kind = type(find_layers(model)[0].family)
    cut = kind.cut

    def recorded(self: Any, layer: Any, method: Any, measurement: Any, size: int) -> Any:
        tried.add(size)
        return cut(self, layer, method, measurement, size)

    monkeypatch.setattr(kind, "cut", recorded)
    assert set(sizes(QWEN3_NEXT, model=model, tolerance=0.5, sizes=[2, 6])) <= {2, 6, STATE_SIZE}
    assert tried
    assert tried <= {2, 6}


def test_sizes_reach_the_cuts_of_a_run() -> None:
    torch.manual_seed(0)
    model = MAMBA.build()
    for _ in range(3):
        compress(model, CompreSSMConfig(fraction=0.3, sizes=[4, 6]), MAMBA.calibration())
    assert model.config.state_size == 4
