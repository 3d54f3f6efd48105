"""Layers that are declared already keep the laws, are cut while they are trained, and come back from their weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import LayerCut, SSMLayer, collect_statistics, find_layers
from hf_compressm.families.family import CutMethod
from hf_compressm.families.laws import check_laws
from hf_compressm.surgery import reshape_layers
from tests.families import ready
from tests.families.measuring import calls_of
from tests.families.ready import READY, Stack, batch, built


SAME = 1e-5
"""Relative; float32 sums in another order."""
STEPS = 30
every_row = pytest.mark.parametrize("name", READY)


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with ready.as_installed():
        yield


def cuts(model: nn.Module, data: list[dict[str, Tensor]], size: int) -> list[tuple[SSMLayer, LayerCut]]:
    """What cutting all layers to a size writes, be it the present one."""
    layers = find_layers(model)
    methods = [CutMethod(layer.family.criteria[0]) for layer in layers]
    found = []
    collected = collect_statistics(model, layers, methods, data)
    for layer, method, statistics in zip(layers, methods, collected, strict=True):
        found.append((layer, layer.family.cut(layer, method, layer.family.measure(layer, method, statistics), size)))
    return found


def write(model: nn.Module, cut: LayerCut) -> None:
    for change in cut.changes:
        owner, _, name = change.name.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Parameter(change.value.to(change.parameter.dtype)))
    for attribute in cut.attributes:
        setattr(attribute.module, attribute.name, attribute.value)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@every_row
def test_it_is_known_and_keeps_the_laws(name: str) -> None:
    row = READY[name]
    model = built(row)
    (layer,) = find_layers(model)
    assert layer.family.name == row.family
    check_laws(layer.family, layer.module, (batch(model, 2)["hidden"],), {})


@every_row
@torch.no_grad()
def test_its_own_recurrences_are_seen_and_nothing_is_changed(name: str) -> None:
    row = READY[name]
    model = built(row).eval()
    data = batch(model)
    before = model(**data)
    (seen,) = calls_of(model, data)
    assert len(seen.calls) == row.calls
    assert all(call.gain is not None and bool((call.gain > 0).any()) for call in seen.calls)
    assert torch.equal(model(**data), before)


@every_row
@torch.no_grad()
def test_all_states_are_what_it_was(name: str) -> None:
    row = READY[name]
    model = built(row).eval()
    data = [batch(model), batch(model)]
    before = model(**data[0])
    found = cuts(model, data, row.size)
    for layer, cut in found:
        assert cut.predicted_error < SAME
        write(model, cut)
        assert layer.state_size == row.size
    assert distance(model(**data[0]), before) < SAME


@every_row
def test_it_is_cut_trained_and_loaded_by_shapes(name: str, tmp_path: Path) -> None:
    row = READY[name]
    model, data = built(row), [batch(built(row)), batch(built(row))]
    target = torch.randn_like(data[0]["hidden"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def step() -> float:
        loss = (model(**data[0]) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for _ in range(3):
        step()
    before = model.eval()(**data[0]).detach()
    result = compress(model, CompreSSMConfig(target_state_size=row.smaller), data, optimizer)
    assert set(result.state_sizes_after.values()) == {row.smaller}
    assert {layer.state_size for layer in find_layers(model)} == {row.smaller}
    assert distance(model(**data[0]).detach(), before) < max(0.05, 3 * worst(result))
    assert moments(optimizer, model) == {3.0}
    losses = [step() for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    assert moments(optimizer, model) == {3.0 + STEPS}

    torch.save(model.state_dict(), tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    other = built(row)
    assert loaded_by_shapes(other, saved)
    assert torch.equal(other.eval()(**data[0]), model.eval()(**data[0]))
    assert {layer.state_size for layer in find_layers(other)} == {row.smaller}
    fresh = row.build(row.smaller)
    fresh.load_state_dict(model.layers[0].state_dict())
    assert sizes(fresh) == sizes(model.layers[0])


def worst(result: Any) -> float:
    return max(layer.predicted_error for layer in result.plan.layers)


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[float]:
    """The steps that all parameters have behind them, with moments of their shapes that are not zero."""
    for parameter in model.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[parameter][name]
            assert moment.shape == parameter.shape
            assert bool(moment.any())
    return {float(optimizer.state[parameter]["step"]) for parameter in model.parameters()}


def loaded_by_shapes(model: Stack, saved: dict[str, Tensor]) -> bool:
    """Load weights of another state size, as a checkpoint of a model without a configuration is loaded."""
    shapes = {
        layer.name: {
            key.removeprefix(f"{layer.name}."): tuple(value.shape)
            for key, value in saved.items()
            if key.startswith(f"{layer.name}.")
        }
        for layer in find_layers(model)
    }
    changed = reshape_layers(model, shapes, lambda *_: None)
    model.load_state_dict(saved)
    return changed


def sizes(layer: nn.Module) -> dict[str, int]:
    """All whole numbers that a layer and its parts hold: a layer that was cut is one that was built so."""
    return {
        f"{part}.{name}": value
        for part, module in layer.named_modules()
        for name, value in vars(module).items()
        if type(value) is int
    }
