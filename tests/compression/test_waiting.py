"""How often a host waits for its device while layers are measured and cut, on a device that counts it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from examples.benchmarks.pretend_device import DEVICE, OnDevice, PretendDevice
from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import CutMethod, collect_statistics, find_layers
from hf_compressm.families.sampling import sampled, spread
from hf_compressm.surgery import moments
from hf_compressm.utils import devices
from tests.family_table import (
    FALCON_MAMBA,
    FAMILIES,
    LAYOUTS,
    MAMBA,
    MAMBA2,
    QWEN3_NEXT,
    S5,
    XLSTM,
    Family,
    family_id,
    token_batch,
)


BATCHES = 2
MOST = 3
"""Times that the host may wait for each layer and batch, in a measurement and the cut after it."""
OF_EACH_KIND = (MAMBA, FALCON_MAMBA, MAMBA2, QWEN3_NEXT, S5)
ROUND_OFF = {"rtol": 2e-3, "atol": 5e-4}
"""Of sums in float32, through the eigenvectors of covariances."""


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    has_float64 = getattr(request, "param", True)
    if has_float64:
        monkeypatch.setattr(devices, "WITH_FLOAT64", (*devices.WITH_FLOAT64, DEVICE.type))
    monkeypatch.setattr(moments, "is_whole", lambda value: value.is_floating_point() or value.is_complex())
    with PretendDevice(has_float64) as device:
        yield device


def both_devices() -> list[Any]:
    """Families on devices with float64, and without."""
    every = [(family, has_float64) for has_float64 in (True, False) for family in LAYOUTS]
    return [
        pytest.param(
            *(family, has_float64),
            marks=() if family in OF_EACH_KIND else pytest.mark.slow,
            id=f"{family.name}-{'float64' if has_float64 else 'without'}",
        )
        for family, has_float64 in every
    ]


def criteria(family: Family) -> tuple[str, ...]:
    return family.criteria if family.is_linear else (*family.criteria, "fisher")


def cases() -> list[Any]:
    return [
        pytest.param(family, criterion, marks=() if family in (*OF_EACH_KIND, XLSTM) else pytest.mark.slow)
        for family in FAMILIES
        for criterion in criteria(family)
    ]


def waits(device: PretendDevice, work: Callable[[], Any]) -> int:
    before = device.count
    work()
    return device.count - before


def measure(model: nn.Module, criterion: str, batches: Sequence[Any]) -> None:
    layers = find_layers(model)
    collect_statistics(model, layers, [CutMethod(criterion)] * len(layers), batches)


def forward(model: nn.Module, batches: Sequence[Any], by_loss: bool) -> None:
    with torch.set_grad_enabled(by_loss):
        for batch in batches:
            model(**batch)


@pytest.mark.parametrize(("family", "criterion"), cases(), ids=lambda value: family_id(value) or value)
def test_a_measurement_waits_once_for_a_layer_and_batch(family: Family, criterion: str, device: PretendDevice) -> None:
    model, batches = device.place(family.build()), device.on_device(family.calibration(BATCHES))
    by_loss = criterion == "fisher"
    of_the_model = waits(device, lambda: forward(model, batches, by_loss))
    found = waits(device, lambda: measure(model, criterion, batches)) - of_the_model
    assert found <= BATCHES * (len(find_layers(model)) + by_loss)  # how many labels are scored is asked once


@pytest.mark.parametrize("family", [MAMBA, MAMBA2], ids=family_id)
def test_padding_is_asked_for_once_where_long_batches_are_sampled(family: Family, device: PretendDevice) -> None:
    tokens = token_batch(8, 80)
    mask = torch.ones_like(tokens["input_ids"])
    mask[:, :7] = 0
    model, batch = device.place(family.build()), device.on_device({**tokens, "attention_mask": mask})
    of_the_model = waits(device, lambda: forward(model, [batch], by_loss=True))
    with sampled():
        found = waits(device, lambda: measure(model, "fisher", [batch])) - of_the_model
    assert found <= 2 * len(find_layers(model)) + 1


def trained(family: Family, place: Callable[[Any], Any] = lambda model: model) -> tuple[Any, torch.optim.Optimizer]:
    """A model after one step of an optimizer, the same one wherever it is."""
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(**family.batch(seed=7)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    state = {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    model = place(model)
    moved = torch.optim.AdamW(model.parameters(), foreach=False)
    for name, parameter in model.named_parameters():
        kept = state[name]
        moved.state[parameter] = {key: place(value) if key != "step" else value for key, value in kept.items()}
    return model, moved


def on_cpu(value: Any) -> Tensor:
    return (value.inner if isinstance(value, OnDevice) else value).detach()


@pytest.mark.parametrize(("family", "device"), both_devices(), indirect=["device"])
def test_a_cut_is_that_of_the_cpu_and_waits_for_no_entry(family: Family, device: PretendDevice) -> None:
    def place(value: Any) -> Any:
        return device.place(value) if isinstance(value, nn.Module) else device.on_device(value)

    settings, batches = CompreSSMConfig(fraction=0.5, refit_steps=0), family.calibration(BATCHES)
    model, optimizer = trained(family)
    elsewhere, other = trained(family, place)
    result = compress(model, settings, batches, optimizer=optimizer)
    before = {name: id(parameter) for name, parameter in elsewhere.named_parameters()}
    inputs = device.on_device(batches)
    of_the_model = waits(device, lambda: forward(elsewhere, inputs, by_loss=False))
    found = waits(device, lambda: compress(elsewhere, settings, inputs, optimizer=other)) - of_the_model
    assert result.changed
    new = dict(elsewhere.named_parameters())
    replaced = [name for name, parameter in new.items() if id(parameter) != before[name]]
    layers, of_each = len(result.plan.layers), 1 if device.has_float64 else 3  # the weight, and its two moments
    assert found <= layers * (BATCHES + 3) + len(replaced) * of_each + 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(on_cpu(new[name]), parameter.detach(), **ROUND_OFF)
        for key, value in optimizer.state[parameter].items():
            torch.testing.assert_close(on_cpu(other.state[new[name]][key]), value, **ROUND_OFF)


def mamba(layers: int, **sizes: int) -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=29, num_hidden_layers=layers, state_size=16, **sizes))


@pytest.mark.parametrize("criterion", ["auto", "surrogate", "fisher"])
@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        pytest.param(3, {"hidden_size": 16, "intermediate_size": 32}, id="small"),
        pytest.param(24, {"hidden_size": 768, "intermediate_size": 1536}, id="mamba-130m", marks=pytest.mark.slow),
    ],
)
def test_calibration_and_cut_wait_three_times_for_a_layer_and_batch(
    criterion: str, layers: int, sizes: dict[str, int], device: PretendDevice
) -> None:
    model = device.place(mamba(layers, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batches = device.on_device([token_batch(1, 20, seed) for seed in range(4)])
    model(**batches[0]).loss.backward()
    optimizer.step()
    settings = CompreSSMConfig(criterion=criterion, fraction=0.5)
    found = waits(device, lambda: compress(model, settings, batches, optimizer=optimizer))
    assert model.config.state_size == 8
    assert layers * len(batches) <= found <= MOST * layers * len(batches)


@pytest.mark.parametrize("real", [0, 1, 5, 9, 10, 11, 25, 40])
def test_places_are_every_so_many_of_the_real_tokens(real: int) -> None:
    mask = torch.zeros(60, dtype=torch.bool)
    mask[torch.randperm(60)[:real]] = True
    places, is_one = spread(mask, 10)
    wanted = mask.nonzero().flatten()[:: max(1, real // 10)]
    assert torch.equal(places[is_one], wanted)
