"""Whether a ranking of states still moves."""

import copy

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.compression import rank_stability, state_scores
from tests.family_table import (
    LRU,
    S5,
    STATE_SIZE,
    Family,
    each,
    family_id,
    same,
    snapshot,
    ssm_layers,
)


every_family = pytest.mark.parametrize("family", each(), ids=family_id)


@every_family
def test_every_layer_has_a_score_for_each_state_of_a_group_and_stays_what_it_is(family: Family) -> None:
    model = family.build()
    before = snapshot(model)
    scores = state_scores(model, CompreSSMConfig(), family.calibration())
    assert list(scores) == list(ssm_layers(model))
    for groups in scores.values():
        assert groups
        assert {len(group) for group in groups} == {STATE_SIZE // family.granularity}
        assert all(type(value) is float and value >= 0 for group in groups for value in group)
    assert same(snapshot(model), before)


@every_family
def test_a_ranking_is_stable_where_nothing_moved(family: Family) -> None:
    model = family.build()
    first, second = (state_scores(model, CompreSSMConfig(), family.calibration()) for _ in range(2))
    assert first == second
    assert rank_stability(first, second) == dict.fromkeys(first, pytest.approx(1.0))


def test_permuted_states_permute_their_scores() -> None:
    model = LRU.build()
    other = copy.deepcopy(model)
    order = torch.randperm(STATE_SIZE)
    for layer in ssm_layers(other).values():
        for name, parameter in layer.named_parameters():
            if name in ("C_re", "C_im"):
                parameter.data = parameter.data[:, order]
            elif name != "D":
                parameter.data = parameter.data[order]
    before, after = (state_scores(each, CompreSSMConfig()) for each in (model, other))
    for name, (group,) in before.items():
        torch.testing.assert_close(torch.tensor(after[name][0]), torch.tensor(group)[order])
        assert rank_stability(before, after)[name] < 1


def test_a_reversed_ranking_is_minus_one_and_a_group_counts_as_much_as_another() -> None:
    up, down = [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]
    assert rank_stability({"a": [up]}, {"a": [down]}) == {"a": pytest.approx(-1)}
    assert rank_stability({"a": [up, up]}, {"a": [up, down]}) == {"a": pytest.approx(0)}


def test_layers_of_another_size_or_that_are_new_are_left_out() -> None:
    before = {"a": [[1.0, 2.0]], "b": [[1.0, 2.0]], "c": [[1.0, 2.0]], "e": []}
    after = {"a": [[1.0, 2.0]], "b": [[1.0]], "c": [[1.0, 2.0], [1.0, 2.0]], "d": [[1.0, 2.0]], "e": []}
    assert rank_stability(before, after) == {"a": pytest.approx(1)}
    assert rank_stability({}, after) == {}


def test_a_cut_leaves_nothing_to_compare_with() -> None:
    model = S5.build()
    before = state_scores(model, CompreSSMConfig())
    compress(model, CompreSSMConfig(target_state_size=4))
    assert rank_stability(before, state_scores(model, CompreSSMConfig())) == {}


def test_a_layer_that_cannot_be_measured_has_no_scores() -> None:
    model = LRU.build()
    first, second = ssm_layers(model)
    ssm_layers(model)[first].C_re.data[0, 0] = torch.nan
    assert list(state_scores(model, CompreSSMConfig())) == [second]
