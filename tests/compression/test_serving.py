"""What the state costs where a model is served, held to the caches that models really fill."""

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress, plan_compression
from hf_compressm.compression import STATE_BYTES, StateCost, count_state_bytes, memory_bytes, state_cost
from tests.caches import cache_of
from tests.family_table import (
    LRU,
    MAMBA,
    MAMBA2,
    MAMBA_FAMILIES,
    ONLY_OWN,
    QWEN3_NEXT,
    S5,
    Family,
    each,
    family_id,
    token_batch,
)


def held(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers in the recurrent and in the convolution's states of a cache, the latter without its oldest column."""
    with torch.no_grad():
        cache = cache_of(model(**token_batch(1, 4), use_cache=True))
    found = []
    for name in ("recurrent_states", "conv_states"):
        tensors: list[torch.Tensor] = []
        for layer in cache.layers:
            values = getattr(layer, name, None)
            tensors += values.values() if isinstance(values, dict) else [values] if values is not None else []
        taps = 0 if name == "recurrent_states" else 1
        found.append(sum(tensor[..., taps:].numel() for tensor in tensors))
    return found[0], found[1]


@pytest.mark.parametrize("family", MAMBA_FAMILIES, ids=family_id)
def test_a_cache_holds_what_is_counted_before_and_after_a_cut(family: Family) -> None:
    model, config, data = family.build(), CompreSSMConfig(fraction=0.5), family.calibration()
    assert (state_cost(model).states, state_cost(model).convolved) == held(model)
    planned = state_cost(model, plan_compression(model, config, data))
    compress(model, config, data)
    assert planned == state_cost(model)
    assert (planned.states, planned.convolved) == held(model)


@pytest.mark.parametrize("family", each(), ids=family_id)
def test_a_plan_costs_what_the_cut_model_costs(family: Family) -> None:
    model, config, data = family.build(), CompreSSMConfig(fraction=0.5), family.calibration()
    before, planned = state_cost(model), state_cost(model, plan_compression(model, config, data))
    assert before.recurrent_bytes(4) == count_state_bytes(model)
    compress(model, config, data)
    assert planned == state_cost(model)
    assert planned.states * 2 == before.states
    assert planned.rows == before.rows


@pytest.mark.parametrize("family", [MAMBA, MAMBA2, QWEN3_NEXT, *ONLY_OWN], ids=family_id)
def test_a_plan_costs_what_the_model_of_a_class_of_this_package_costs(family: Family) -> None:
    model, config, data = family.build(), CompreSSMConfig(fraction=0.5, compat="best"), family.calibration()
    before, planned = state_cost(model), state_cost(model, plan_compression(model, config, data))
    compress(model, config, data)
    assert planned == state_cost(model)
    assert planned.states * 2 == before.states
    assert planned.convolved == before.convolved  # what is projected behind the convolution leaves it as it is


def test_the_convolution_of_a_mamba2_shrinks_and_that_of_a_mamba_does_not() -> None:
    for family, shrinks in ((MAMBA, False), (MAMBA2, True)):
        model = family.build()
        plan = plan_compression(model, CompreSSMConfig(fraction=0.5), family.calibration())
        assert (state_cost(model, plan).convolved < state_cost(model).convolved) is shrinks
    assert state_cost(LRU.build()).convolved == state_cost(S5.build()).convolved == 0


def test_bytes_sequences_and_traffic_by_hand() -> None:
    cost = StateCost(states=1280, rows=10, convolved=60)  # ten rows of 128 states, 20 channels with four taps
    assert [cost.recurrent_bytes(width) for width in STATE_BYTES.values()] == [5120, 2560, 1320]
    assert cost.convolution_bytes == 120
    assert cost.moved_bytes(4) == 2 * (5120 + 120)
    assert cost.sequences(5240 * 3 - 1, 4) == 2
    assert cost.sequences(5240 * 3, 4) == 3
    assert cost.to_dict(14400)["8 bits"] == {
        "state_bytes": 1320,
        "convolution_bytes": 120,
        "sequences": 10,
        "bytes_per_token": 2880,
    }


@pytest.mark.parametrize(
    ("text", "count"),
    [("40GiB", 40 * 2**30), ("80 GB", 80 * 10**9), ("1.5gib", 3 * 2**29), ("512 MiB", 2**29), ("1000", 1000)],
)
def test_memory_has_a_unit(text: str, count: int) -> None:
    assert memory_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "40 cards", "-1GB", "0GB", "1e9"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 40GiB or 80GB, got "):
        memory_bytes(text)
