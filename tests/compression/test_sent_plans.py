"""Plans on their way to another process: few bytes, and the same weights and moments there."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hf_compressm import CompreSSMConfig, apply_plan, plan_compression
from hf_compressm.compression.plan import CompressionPlan
from hf_compressm.utils.processes import dump, load
from tests.family_table import LRU, same, token_batch


SMALL = 8 * 2**10
"""Bytes of a plan of one layer."""
SIZES = {"hidden_size": 768, "num_hidden_layers": 1, "vocab_size": 32}  # of mamba-130m
HEADS = {"state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1}  # of mamba2-130m
MODELS = {
    "selected and folded": lambda: MambaForCausalLM(MambaConfig(**SIZES)),
    "with a factor": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SIZES)),
    "selected": lambda: Mamba2ForCausalLM(Mamba2Config(**SIZES, **HEADS)),
}


def trained(model: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A model with an optimizer that has moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def written(plan: CompressionPlan) -> int:
    """Bytes of the weights that a plan writes."""
    changes = [change for layer in plan.layers if layer.cut is not None for change in layer.cut.changes]
    return sum(change.value.numel() * change.parameter.element_size() for change in changes)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_selection_is_sent_in_few_bytes_and_gives_the_same_bits(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    one, own = trained(build())
    other, others = copy.deepcopy((one, own))
    batches = [{**token_batch(1, 8, seed=seed), "use_cache": False} for seed in range(2)]
    plan = plan_compression(one, CompreSSMConfig(fraction=0.5, refit_steps=0), batches)
    sent = dump(plan, one)
    assert len(sent) < min(SMALL, written(plan) / 50)
    assert apply_plan(one, plan, own).changed
    apply_plan(other, load(sent, other), others)
    assert same(dict(one.state_dict()), dict(other.state_dict()))
    assert same(own.state_dict()["state"], others.state_dict()["state"])


def test_values_that_a_family_gives_itself_are_sent_as_they_will_be_written() -> None:
    model = LRU.build(dtype=torch.float32, state_size=16)
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5))
    sent = load(dump(plan, model), model)
    for planned, received in zip(plan.layers, sent.layers, strict=True):
        for one, other in zip(planned.cut.changes, received.cut.changes, strict=True):
            assert one.value.dtype == torch.float64
            assert torch.equal(one.value.to(one.parameter.dtype), other.value)
            assert other.value.dtype == other.parameter.dtype


def test_a_plan_holds_no_values_of_parameters_that_it_maps() -> None:
    torch.manual_seed(0)
    model = MODELS["selected"]()
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5, refit_steps=0), [token_batch(1, 8)])
    (layer,) = plan.layers
    before = [change.value for change in layer.cut.changes]
    with torch.no_grad():
        for change in layer.cut.changes:
            change.parameter.mul_(2)
    assert all(torch.equal(change.value, 2 * value) for change, value in zip(layer.cut.changes, before, strict=True))
    given = replace(layer.cut.changes[0], value=before[0])
    assert given.value is before[0]
    assert replace(given, name="other").value is before[0]
    assert isinstance(given.parameter, nn.Parameter)
