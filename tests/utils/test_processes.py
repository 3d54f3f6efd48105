"""One process alone, and what is sent between several; several run in test_launched.py."""

import copy
from itertools import chain

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, apply_plan, plan_compression
from hf_compressm.utils.processes import ALONE, Processes, checksum, dump, load
from tests.family_table import (
    FAMILIES,
    Family,
    each,
    family_id,
)


@pytest.mark.parametrize("family", each(), ids=family_id)
def test_a_plan_that_was_sent_cuts_another_copy_in_the_same_way(family: Family) -> None:
    one = family.build(state_size=16)
    other = copy.deepcopy(one)
    plan = plan_compression(one, CompreSSMConfig(fraction=0.5), family.calibration())
    sent = load(dump(plan, one), other)
    apply_plan(one, plan)
    assert apply_plan(other, sent).changed
    weights = other.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())
    assert one.config.to_dict() == other.config.to_dict()
    mine, theirs = ({id(p) for p in model.parameters()} for model in (one, other))
    assert not mine & theirs


def test_a_plan_that_was_sent_does_not_fit_other_weights() -> None:
    family = FAMILIES[0]
    one, other = family.build(), family.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-3)
    sent = load(dump(plan_compression(one, CompreSSMConfig(fraction=0.5), family.calibration()), one), other)
    with pytest.raises(ValueError, match="other weights in another process"):
        apply_plan(other, sent)


def test_parts_are_the_whole() -> None:
    items = list(range(10))
    parts = [Processes(3, rank).share(items) for rank in range(3)]
    assert sorted(chain(*parts)) == items
    assert parts[0] == [0, 3, 6, 9]
    assert Processes(8, 7).share([1, 2]) == []


def test_one_process_alone_waits_for_nobody() -> None:
    assert Processes.current().size == 1
    assert ALONE.first(lambda: 3) == 3
    assert ALONE.gather("x") == ["x"]
    ALONE.compare(lambda: pytest.fail("nothing to compare"), "nothing")
    with pytest.raises(KeyError, match="own"), ALONE.together():
        raise KeyError("own")


def test_checksums_see_every_bit_and_no_stride() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert checksum(tensor.mT) == checksum(tensor.mT.contiguous()) != checksum(tensor)
    assert checksum(tensor.bfloat16()) != checksum(tensor)
    column = torch.zeros(1, 4)[:, :1]  # one entry, with the stride of four
    assert checksum(nn.Parameter(column)) == checksum(torch.zeros(1, 1))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.ones(2, dtype=torch.complex64)) == checksum(torch.view_as_real(torch.ones(2) + 0j))
