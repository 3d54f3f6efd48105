"""Cuts of s5-pytorch's own layer, whose parameters are complex: function, error, moments, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from s5 import S5Block
from s5.s5_model import S5SSM, discretize_bilinear
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress, plan_compression
from hf_compressm.families import SSMLayer, find_layers
from hf_compressm.families.linear import _fill
from hf_compressm.numerics import balance, truncate
from hf_compressm.numerics.balancing import _project
from hf_compressm.surgery import reshape_layers
from hf_compressm.surgery.mapping import mapped
from tests.family_table import same


WIDTH, STATES = 6, 16
CLOSE = 1e-5
"""Relative; complex64, the package's own precision."""
SUMMED = 1e-3
"""Relative; gradients in complex64, summed over a batch of sequences, under a change of basis."""
VARIANTS: dict[str, dict[str, Any]] = {
    "one way": {},
    "bilinear": {"bilinear": True},
    "both ways": {"bidir": True},
    "both ways, bilinear": {"bidir": True, "bilinear": True},
    "in blocks": {"block_count": 2, "bcInit": "complex_normal"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))


class Frames(nn.Module):
    """A classifier of sequences of vectors: blocks of the package between two projections."""

    def __init__(self, bilinear: bool = False, bidir: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(S5Block(WIDTH, STATES, bidir, **kwargs) for _ in range(2))
        for module in self.modules():
            if isinstance(module, S5SSM) and bilinear:
                module.discretize = discretize_bilinear

    def forward(self, frames: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.encoder(frames)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden.mean(1))
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def built(**variant: Any) -> tuple[Frames, SSMLayer]:
    model = Frames(**variant)
    return model, find_layers(model)[0]


def without_feed_through(layer: SSMLayer, signal: Tensor) -> Tensor:
    """The layer's own output on a batch of sequences, called as the package calls it."""
    with torch.no_grad():
        return torch.vmap(layer.module)(signal) - layer.module.D * signal


def impulses(layer: SSMLayer, steps: int, reverse: bool = False) -> Tensor:
    """The layer's response to an impulse in each channel, (steps, outputs, inputs)."""
    signal = torch.zeros(WIDTH, steps, WIDTH)
    signal[torch.arange(WIDTH), -1 if reverse else 0, torch.arange(WIDTH)] = 1.0
    out = without_feed_through(layer, signal)
    return (out.flip(1) if reverse else out).permute(1, 2, 0).double()


@every_variant
def test_the_system_is_what_the_layer_computes(variant: dict) -> None:
    _, layer = built(**variant)
    assert layer.family.name == "s5_pytorch"
    assert layer.state_size == STATES
    response = layer.family.system(layer.module).impulse_response(20)  # the forward read-out above the backward one
    forward, backward = response.chunk(2, dim=1) if variant.get("bidir") else (response, torch.zeros_like(response))
    first = backward[0]  # an impulse meets its own step in both directions
    expected = forward.clone()
    expected[0] += first
    found = impulses(layer, 20)
    assert (found - expected).norm() <= CLOSE * 10 * expected.norm()
    if variant.get("bidir"):
        expected = backward.clone()
        expected[0] += forward[0]
        assert (impulses(layer, 20, reverse=True) - expected).norm() <= CLOSE * 10 * expected.norm()
    assert layer.family.state_entries(layer.module) == 2 * STATES * (2 if variant.get("bidir") else 1)


@every_variant
def test_full_rank_is_the_identity(variant: dict) -> None:
    _, layer = built(**variant)
    signal = torch.randn(3, 40, WIDTH)
    before = without_feed_through(layer, signal)
    system = layer.family.system(layer.module)
    truncation = truncate(balance(system, "real"), STATES)
    with torch.no_grad():
        for change in layer.family._changes(layer, _fill(system, truncation, STATES)):
            assert change.value.shape == change.parameter.shape
            change.parameter.copy_(change.value)
    after = without_feed_through(layer, signal)
    assert (after - before).norm() <= CLOSE * before.norm()


@every_variant
@pytest.mark.parametrize("size", [8, 3])
def test_a_cut_layer_computes_the_reduced_system_within_its_bound(variant: dict, size: int) -> None:
    model, layer = built(**variant)
    full = layer.family.system(layer.module)
    expected = truncate(balance(full, "real"), size).system.impulse_response(60)
    entry = compress(model, CompreSSMConfig(target_state_size=size)).plan.layers[0]
    module, ways = layer.module, 2 if variant.get("bidir") else 1
    assert [tuple(p.shape) for p in (module.Lambda, module.log_step, module.B, module.C)] == [
        (size,),
        (size,),
        (size, WIDTH, 2),
        (WIDTH, ways * size),
    ]
    assert module.Lambda.dtype == module.C.dtype == torch.complex64
    assert module.B.dtype == module.log_step.dtype == torch.float32
    reduced = layer.family.system(module)
    assert (reduced.impulse_response(60) - expected).norm() <= CLOSE * 10 * expected.norm()
    error = (full - reduced).frequency_response(torch.linspace(0, torch.pi, 400, dtype=torch.float64))
    if ways == 2:
        forward, backward = error.chunk(2, dim=1)
        error = forward + backward.conj()
    assert entry.error_bound is not None
    assert float(torch.linalg.matrix_norm(error, ord=2).max()) <= entry.error_bound * (1 + 1e-6) + 1e-6


@every_variant
def test_the_predicted_error_is_that_on_white_input(variant: dict) -> None:
    model, layer = built(**variant)
    white = torch.randn(8, 3000, WIDTH)
    before = without_feed_through(layer, white)
    entry = compress(model, CompreSSMConfig(target_state_size=4)).plan.layers[0]
    after = without_feed_through(layer, white)
    assert float((after - before).norm() / before.norm()) == pytest.approx(entry.predicted_error, rel=0.25)


@every_variant
def test_mapped_gradients_of_B_and_C_are_autograds_under_a_full_change_of_basis(variant: dict) -> None:
    """Projecting on all balanced states is a similarity, so that gradients map exactly."""
    _, layer = built(**variant)
    module, family = layer.module, layer.family
    with torch.no_grad():  # well reachable states, so that the similarity is well conditioned
        module.Lambda.copy_(torch.complex(torch.full((STATES,), -3.0), torch.linspace(-20, 20, STATES)))
        module.log_step.fill_(-2.0)
        for parameter in (module.B, module.C):
            parameter.copy_(torch.randn_like(parameter))
    full = family.system(module)
    truncation = _project(balance(full, "complex"), torch.arange(full.order))
    assert truncation is not None
    changes = family._changes(layer, _fill(full, truncation, full.order))
    u, target = torch.randn(2, 40, WIDTH), torch.randn(2, 40, WIDTH)

    def gradients() -> dict[int, Tensor]:
        module.zero_grad()
        (torch.vmap(module)(u) * target).sum().backward()
        return {id(parameter): parameter.grad.clone() for parameter in module.parameters()}

    old = gradients()
    moved = {change.name.rpartition(".")[2]: mapped(change.moments, lambda p: old[id(p)]) for change in changes}
    with torch.no_grad():
        for change in changes:
            change.parameter.copy_(change.value)
    new = gradients()
    for name in ("B", "C"):
        expected = new[id(getattr(module, name))]
        assert moved[name].dtype == expected.dtype
        assert (moved[name] - expected).norm() <= SUMMED * expected.norm(), name


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    frames = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(1))
    labels = frames.cumsum(1).mean((1, 2)).gt(0).long()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(frames), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bidir", [False, True])
def test_training_goes_on_after_a_cut_and_from_what_was_saved(bidir: bool, tmp_path: Path) -> None:
    model = Frames(bidir=bidir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = train(model, optimizer, 10)
    result = compress(model, CompreSSMConfig(target_state_size=STATES // 2), optimizer=optimizer)
    assert set(result.state_sizes_after.values()) == {STATES // 2}
    for layer in find_layers(model):
        for parameter in layer.module.parameters():
            state = optimizer.state[parameter]
            assert state["step"] == 10
            assert all(state[key].shape == parameter.shape for key in ("exp_avg", "exp_avg_sq"))
            assert all(state[key].dtype == parameter.dtype for key in ("exp_avg", "exp_avg_sq"))
            squares = torch.view_as_real(state["exp_avg_sq"]) if parameter.is_complex() else state["exp_avg_sq"]
            assert bool((squares >= 0).all())
            assert bool((squares > 0).any())
    after = train(model, optimizer, 30)
    assert after[0] < before[0]
    assert after[-1] < after[0]

    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    fresh = Frames(bidir=bidir)
    again = torch.optim.AdamW(fresh.parameters(), lr=2e-3)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        layer.name: {
            name.removeprefix(f"{layer.name}."): tuple(value.shape)
            for name, value in saved["model"].items()
            if name.startswith(layer.name)
        }
        for layer in find_layers(fresh)
    }
    assert reshape_layers(fresh, shapes, lambda *_: None, again)
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert train(fresh, again, 3) == train(model, optimizer, 3)
    assert same(fresh.state_dict(), model.state_dict())


@pytest.mark.slow
def test_a_trainer_cuts_and_resumes_across_a_cut_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    data = [{"frames": torch.randn(8, 3, generator=generator), "labels": torch.tensor(i % 4)} for i in range(24)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        save_steps=2,
        per_device_train_batch_size=4,
        optim="adamw_torch",  # the fused one refuses complex parameters
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    finished = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        torch.manual_seed(0)
        model = Frames(bidir=True)
        callback = CompreSSMCallback(CompreSSMConfig(target_state_size=6, start=2, end=3, num_cuts=1))
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=checkpoint)
        assert {tuple(layer.module.C.shape) for layer in find_layers(model)} == {(WIDTH, 12)}
        finished.append((model.state_dict(), trainer.optimizer.state_dict()["state"]))
    assert same(finished[0], finished[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"liquid": True}, r"blocks\.0\.s5\.seq has liquid=True.*not linear time-invariant.*ignore_layers"),
        ({"degree": 2}, r"blocks\.0\.s5\.seq has degree=2.*ignore_layers"),
        ({"bcInit": "factorized"}, r"blocks\.0\.s5\.seq has bcInit='factorized'.*ignore_layers"),
        ({"discretize": torch.add}, r"blocks\.0\.s5\.seq has the discretisation add; known are discretize_bilinear"),
    ],
)
def test_layers_that_are_not_linear_systems_are_refused(change: dict, message: str) -> None:
    model, layer = built()
    for name, value in change.items():
        setattr(layer.module, name, value)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        compress(model, CompreSSMConfig(target_state_size=8))
    assert same(dict(model.state_dict()), before)
    result = compress(model, CompreSSMConfig(target_state_size=8, ignore_layers=["blocks.0.*"]))
    assert set(result.state_sizes_after.values()) == {8}
    assert layer.module.Lambda.shape == (STATES,)


def test_measuring_on_data_is_refused_and_no_data_is_needed() -> None:
    model, _ = built()
    with pytest.raises(ValueError, match=r"criterion='empirical' does not apply to s5_pytorch layers; .*hankel"):
        plan_compression(model, CompreSSMConfig(criterion="empirical"), [torch.randn(2, 5, 3)])
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5), [torch.randn(2, 5, 3)])
    assert {entry.criterion for entry in plan.layers} == {"hankel"}


def test_a_layer_with_growing_states_stays_as_it_is() -> None:
    model, layer = built()
    with torch.no_grad():
        layer.module.Lambda[3] = 0.5 + 1j
    entry = plan_compression(model, CompreSSMConfig(fraction=0.5)).layers[0]
    assert entry.new_state_size == STATES
    assert "unstable" in entry.reason
    assert "clips the real part of Lambda, keeps it below 1" in entry.reason
