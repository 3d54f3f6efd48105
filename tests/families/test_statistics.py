"""What calibration counts: real tokens, each once, in whatever form the batches come."""

import re
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from hf_compressm import CompreSSMConfig, S5Config, S5ForSequenceClassification, analyze
from hf_compressm.families import CutMethod, collect_statistics, find_layers, run_batch
from hf_compressm.families.sampling import sampled
from hf_compressm.scans import enable_fast_selective_scan
from tests.families.measuring import run
from tests.family_table import (
    BAMBA,
    LRU,
    MAMBA,
    MAMBA2,
    S5,
    Family,
    family_id,
)


RIGHT, LEFT = "right", "left"
SAMPLED = 0.3
"""Relative: half of 64 random texts, in layers that were never trained."""
CLOSE = 1e-6
"""Relative: other shapes of the same float32 products."""


def padded(batch: dict[str, Tensor], length: int, side: str) -> dict[str, Tensor]:
    """The same texts with padding tokens of every kind on one side."""
    ids = batch["input_ids"]
    filler = torch.randint(0, 13, (ids.shape[0], length - ids.shape[1]), generator=torch.Generator().manual_seed(9))
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(filler)], dim=1)
    rows = torch.cat([ids, filler], dim=1)
    if side == LEFT:
        rows, mask = rows.roll(filler.shape[1], dims=1), mask.roll(filler.shape[1], dims=1)
    return {"input_ids": rows, "attention_mask": mask}


def sums_of(model: nn.Module, criterion: str, batches: list) -> dict[str, Tensor]:
    layers = find_layers(model)
    (first, *_) = collect_statistics(model, layers, [CutMethod(criterion)] * len(layers), batches)
    assert first is not None
    return {name: value for name, value in first.sums.items() if name != "calls"}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert float((value - other[name]).abs().max()) <= CLOSE * float(value.abs().max()), name


@pytest.mark.parametrize("side", [RIGHT, LEFT])
@pytest.mark.parametrize("length", [16, 40])
@pytest.mark.parametrize("family", [LRU, S5, MAMBA, MAMBA2], ids=family_id)
def test_padding_is_not_counted(family: Family, length: int, side: str) -> None:
    model, batch = family.build().eval(), {"input_ids": family.batch()["input_ids"]}
    criterion = find_layers(model)[0].family.criterion("auto", calibrated=True)
    alone = sums_of(model, criterion, [batch])
    assert int(alone["tokens"]) == batch["input_ids"].numel()
    assert_close(alone, sums_of(model, criterion, [padded(batch, length, side)]))


@pytest.mark.parametrize("family", [LRU, S5, MAMBA, MAMBA2], ids=family_id)
def test_a_sample_of_a_long_batch_does_not_depend_on_padding_and_is_close_to_all_of_it(family: Family) -> None:
    model, batch = family.build().eval(), {"input_ids": family.batch(64, 64)["input_ids"]}
    criterion = find_layers(model)[0].family.criterion("auto", calibrated=True)
    with sampled():
        sample = sums_of(model, criterion, [batch])
        assert int(sample["tokens"]) == 32 * 64
        assert_close(sample, sums_of(model, criterion, [padded(batch, 100, RIGHT)]))
    whole = sums_of(model, criterion, [batch])
    steady = {name for name in whole if name != "P" or family is not MAMBA2}  # there a few loud tokens decide on P
    for name in steady:
        value = whole[name]
        mean, found = value / whole["tokens"], sample[name] / sample["tokens"]
        assert float((found - mean).norm()) <= SAMPLED * float(mean.norm()), name


@pytest.mark.parametrize("side", [RIGHT, LEFT])
def test_padding_is_not_counted_in_either_direction(side: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 6, "state_size": 8, "num_hidden_layers": 2}
    model = S5ForSequenceClassification(S5Config(**sizes, bidirectional=True)).eval()
    batch = {"input_ids": LRU.batch()["input_ids"]}
    alone = sums_of(model, "empirical", [batch])
    assert_close(alone, sums_of(model, "empirical", [padded(batch, 32, side)]))


def test_the_same_texts_padded_to_any_length_give_the_same_sizes() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "state_size": 64, "num_hidden_layers": 2, "num_labels": 2}
    model = S5ForSequenceClassification(S5Config(**sizes)).eval()
    generator = torch.Generator().manual_seed(2)
    batch = {"input_ids": torch.randint(2, 13, (16, 12), generator=generator)}
    found = []
    for length in (16, 128, 512):
        plan = analyze(model, CompreSSMConfig(tolerance=0.1, min_reduction=0), [padded(batch, length, RIGHT)])
        found.append([layer.new_state_size for layer in plan.layers])
    assert found[0] == found[1] == found[2]
    assert max(found[0]) < 64


@pytest.mark.parametrize("family", [MAMBA2, BAMBA], ids=family_id)
def test_packed_texts_count_as_they_would_apart(family: Family) -> None:
    model = family.build().eval()
    layer = find_layers(model)[0]
    hidden = torch.randn(1, 20, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    number = torch.tensor([[0] * 7 + [1] * 4 + [2] * 9])

    def seen(*calls: tuple[Tensor, dict[str, Any]]) -> dict[str, Tensor]:
        statistics = run(layer.module, "empirical", *calls)
        return {name: value for name, value in statistics.sums.items() if name != "calls"}

    enable_fast_selective_scan()  # the stock convolution needs a kernel to keep texts apart
    apart = seen(*((hidden[:, number[0] == text], {}) for text in range(3)))
    assert_close(apart, seen((hidden, {"seq_idx": number})))
    run_on = seen((hidden, {}))
    assert not torch.allclose(run_on["P"], apart["P"])


@pytest.mark.parametrize("family", [LRU, S5, MAMBA, MAMBA2], ids=family_id)
@pytest.mark.parametrize(
    ("rows", "mask", "reason"),
    [
        (4, 0, "the calibration holds nothing but padding"),
        (1, 1, r"2 calibration token\(s\) cannot rank"),
    ],
)
def test_too_little_data_is_named_as_that(family: Family, rows: int, mask: int, reason: str) -> None:
    ids = family.batch()["input_ids"]
    batch = {"input_ids": ids[:rows, : 2 if mask else None]}
    batch["attention_mask"] = torch.full_like(batch["input_ids"], mask)
    plan = analyze(family.build(), CompreSSMConfig(tolerance=0.1), [batch])
    assert {layer.status for layer in plan.layers} == {"skipped"}
    assert all(re.search(reason, layer.reason) for layer in plan.layers)


@pytest.mark.parametrize("family", [LRU, MAMBA, MAMBA2], ids=family_id)
def test_a_size_that_is_named_is_reached_with_few_tokens_too_and_a_warning(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.compression.measuring.logger.warning", told.append)
    plan = analyze(family.build(), CompreSSMConfig(target_state_size=4), [{"input_ids": torch.arange(6)[None]}])
    assert {layer.new_state_size for layer in plan.layers} == {4}
    assert all("is cut to the size that the settings name, but 6 calibration token(s)" in text for text in told)
    assert len(told) == len(plan.layers)


class Taking(nn.Module):
    """Takes what it is given, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, first: Any = None, second: Any = None) -> None:
        self.got = (first, second)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"first": 1, "labels": 2}, (1, None)),
        (UserDict({"second": 1}), (None, 1)),
        (BatchEncoding({"first": 3, "token_type_ids": 4}), (3, None)),
        ([1, 2], (1, 2)),
        ((1,), (1, None)),
        ({"first": (1, {"deep": 2})}, ((1, {"deep": 2}), None)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batch_is_run_as_a_loader_gives_it(batch: Any, got: tuple) -> None:
    model = Taking()
    run_batch(model, batch)
    assert model.got == got


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_nested_inputs_go_to_the_models_device(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Taking()
    monkeypatch.setattr("hf_compressm.families.statistics._device", lambda model: torch.device("meta"))
    deep = {"deep": torch.zeros(1)} if kind is dict else kind([torch.zeros(1)])
    run_batch(model, {"first": (deep, "text", None)})
    (moved, *rest), _ = model.got
    assert (moved["deep"] if kind is dict else moved[0]).device.type == "meta"
    assert rest == ["text", None]
