"""Layers are seen while they run, in whatever mode, and run as if nobody looked."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mamba import modeling_mamba

from hf_compressm import CompreSSMConfig, Layout, analyze, declare_layer, enable_fast_selective_scan, rows, states
from hf_compressm.families import find_layers
from hf_compressm.families.sums import Statistics
from hf_compressm.families.watching import watching
from tests.blocks import SS2D, OffsetVim
from tests.families.measuring import Recorded, calls_of, run
from tests.family_table import (
    LAYOUTS,
    MAMBA,
    MAMBA2,
    S5_BIDIRECTIONAL,
    Family,
    each,
    family_id,
    outputs,
    same,
)
from tests.watch_run import FAMILIES as WATCHED


ROOT = Path(__file__).resolve().parents[2]
CLOSE = 1e-5
"""Relative; float32 sums in another order."""
TWO_WAYS = Layout(
    state_size="d_state",
    parts=(
        states("A_log"),
        rows("x_proj", "*", "B", "C", folds=True),
        states("A_b_log", group=1),
        rows("x_proj_b", "*", "B", "C", folds=True, group=1),
    ),
)
FOUR_WAYS = Layout(
    state_size="d_state",
    parts=(states("A_logs", by_group=True), rows("x_proj_weight", "*", "B", "C", folds=True, by_group=True)),
    groups=4,
)


@pytest.fixture(scope="module", autouse=True)
def declared() -> None:
    declare_layer(OffsetVim, TWO_WAYS)
    declare_layer(SS2D, FOUR_WAYS)


def watched(model: nn.Module, family: Family) -> list[tuple[Any, Statistics]]:
    found = []
    for layer in find_layers(model):
        statistics = layer.family.statistics(layer.module, family.criteria[0])
        assert statistics is not None
        found.append((layer, statistics))
    return found


def sums(watches: list[tuple[Any, Statistics]]) -> list[dict[str, Tensor]]:
    return [item.sums for _, item in watches]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class WithNorm(OffsetVim):
    """A block with a norm between its recurrences and its output projection."""

    def __init__(self, norm: str) -> None:
        super().__init__(8, 4)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        xz = self.in_proj.weight @ x.mT
        y = self.direction(xz, "", "A_log") + self.direction(xz.flip(-1), "_b", "A_b_log").flip(-1)
        return self.out_proj(NORMS[self.norm](y).mT)


NORMS = {
    "rms": lambda y: F.rms_norm(y.mT, (16,)).mT,
    "layer": lambda y: F.layer_norm(y.mT, (16,), torch.linspace(0.5, 2, 16)).mT,
    "group": lambda y: F.group_norm(y, 4, torch.linspace(0.5, 2, 16)),
    "unit": lambda y: F.normalize(y, dim=1),
    "written out": lambda y: y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-5),
}
SCALES = {
    "rms": lambda y: (y.square().mean(1, keepdim=True) + torch.finfo(y.dtype).eps).rsqrt(),
    "layer": lambda y: (y.var(1, correction=0, keepdim=True) + 1e-5).rsqrt() * torch.linspace(0.5, 2, 16)[:, None],
    "group": lambda y: (
        (y.unflatten(1, (4, 4)).flatten(2).var(2, correction=0) + 1e-5).rsqrt().repeat_interleave(4, 1)[..., None]
        * torch.linspace(0.5, 2, 16)[:, None]
    ),
    "unit": lambda y: 1 / y.norm(dim=1, keepdim=True),
    "written out": lambda y: (y.square().mean(1, keepdim=True) + 1e-5).rsqrt(),
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_scale_of_every_norm_is_a_constant_for_the_loudness_and_none_for_the_gradient(norm: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(WithNorm(norm)), torch.randn(2, 9, 8)
    block = model[0]
    model(x).square().sum().backward()
    plain = gradients(model)
    model.zero_grad()
    layer, recorded = find_layers(model)[0], Recorded()
    with watching(model, [(layer, recorded)]):
        result = model(x)
    result.square().sum().backward()
    for name, gradient in plain.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-5 * scale)
    forth, back = recorded.seen[0].calls
    y = (forth.output + back.output.flip(-1)).detach()
    loud = SCALES[norm](y) * block.out_proj.weight.detach().norm(dim=0)[:, None]
    torch.testing.assert_close(forth.gain, loud.expand_as(y).abs(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(back.gain.flip(-1), loud.expand_as(y).abs(), rtol=1e-3, atol=1e-5)


class Switched(OffsetVim):
    """A block with a kernel of its own, unless it is told otherwise."""

    is_fast = True

    def direction(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        return xz.chunk(2, dim=1)[0] if self.is_fast else super().direction(xz, ending, decay)


def test_a_switch_that_is_declared_is_turned_for_the_measured_batches_alone() -> None:
    declare_layer(Switched, TWO_WAYS)
    model, x = nn.Sequential(Switched(8, 4)), [torch.randn(2, 9, 8)]
    with pytest.raises(ValueError, match="law of recurrence: its forward calls no known recurrence"):
        analyze(model, CompreSSMConfig(fraction=0.5), x)
    declare_layer(Switched, replace(TWO_WAYS, unfused={"is_fast": False}))
    assert [layer.new_state_size for layer in analyze(model, CompreSSMConfig(fraction=0.5), x).layers] == [2]
    assert model[0].is_fast


@pytest.mark.parametrize("family", LAYOUTS, ids=family_id)
def test_in_a_training_step_the_sums_are_the_same_and_so_are_the_gradients(family: Family) -> None:
    model, batch = family.build(), family.batch()
    aside = watched(model, family)
    with watching(model, aside), torch.no_grad():
        model(**batch)
    model(**batch).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    inside = watched(model, family)
    with watching(model, inside):
        loss = model(**batch).loss
    loss.backward()
    assert same(gradients(model), plain)
    for one, other in zip(sums(aside), sums(inside), strict=True):
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=CLOSE, atol=CLOSE * float(one[name].abs().max()))


def test_what_gradient_checkpointing_runs_again_is_not_seen_again() -> None:
    model, batch = MAMBA.build().train(), MAMBA.batch()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    seen = watched(model, MAMBA)
    with watching(model, seen):
        model(**batch).loss.backward()
    assert [int(item.sums["calls"]) for _, item in seen] == [1, 1]
    block = nn.Sequential(OffsetVim(8, 4))
    found = find_layers(block)[0]
    statistics = found.family.statistics(found.module, "interpolative")
    with watching(block, [(found, statistics)]):
        checkpoint(block, torch.randn(2, 9, 8, requires_grad=True), use_reentrant=True).sum().backward()
    assert int(statistics.sums["calls"]) == 1


@pytest.mark.parametrize("family", each(), ids=family_id)
def test_nothing_is_left_behind(family: Family) -> None:
    model, batch = family.build(), family.batch()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before, attributes = outputs(model, batch), [dict(vars(module)) for module in model.modules()]
    held = {name: dict(vars(module)) for name, module in sys.modules.items() if "modeling_" in name}
    for fails in (False, True):
        handle = model.register_forward_hook(lambda *_: 1 / 0) if fails else None
        with watching(model, watched(model, family)), torch.no_grad():
            try:
                seen = model(**batch).logits
            except ZeroDivisionError:
                assert fails
        if handle is not None:
            handle.remove()
        assert torch.is_grad_enabled()
        assert torch.equal(seen, before)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
        assert [vars(module).keys() for module in model.modules()] == [each.keys() for each in attributes]
        for name, space in held.items():
            assert all(vars(sys.modules[name])[key] is value for key, value in space.items())


def test_an_error_inside_of_a_layer_leaves_nothing_behind() -> None:
    block = nn.Sequential(OffsetVim(8, 4))
    block[0].out_proj.forward = lambda _: 1 / 0
    layer = find_layers(block)[0]
    with watching(block, [(layer, layer.family.statistics(layer.module, "interpolative"))]), torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            block(torch.randn(2, 9, 8))
        assert not torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in block.parameters())
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("family", [MAMBA, MAMBA2], ids=family_id)
def test_fused_functions_do_not_run(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family.build().train()
    module = sys.modules[type(model).__module__]
    name = "mamba_inner_fn" if hasattr(module, "mamba_inner_fn") else "mamba2_split_conv1d_scan_combined"
    monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the fused function was called"))
    for seen in calls_of(model, family.batch()):
        assert len(seen.calls) == 1


def plain_covariances(block: OffsetVim, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """P and Q of both directions, step by step."""
    xz, found = (block.in_proj.weight @ x.mT), []
    for ending, decay in (("", "A_log"), ("_b", "A_b_log")):
        u, z = (xz.flip(-1) if ending else xz).chunk(2, dim=1)
        u = F.silu(getattr(block, f"conv1d{ending}")(u))
        step, B, C = getattr(block, f"x_proj{ending}")(u.mT).split([block.dt_rank, block.d_state, block.d_state], -1)
        delta = F.softplus(getattr(block, f"dt_proj{ending}")(step)) + block.offset  # (batch, length, channels)
        A, loud = -getattr(block, decay).exp(), F.silu(z).abs().mT * block.out_proj.weight.norm(dim=0)
        h, P = torch.zeros(x.shape[0], *A.shape), torch.zeros(block.d_state, block.d_state)
        for t in range(x.shape[1]):
            h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, :, t])[..., None] * B[:, t, None]
            weighted = (h * loud[:, t, :, None]).flatten(0, 1)
            P = P + weighted.T @ weighted
        found.append((P, C.flatten(0, 1).T @ C.flatten(0, 1)))
    return found


@torch.no_grad()
def test_both_directions_are_measured_each_by_itself() -> None:
    torch.manual_seed(0)
    block, x = OffsetVim(8, 6), torch.randn(3, 17, 8)
    statistics = run(block, "interpolative", (x, {}))
    for group, (P, Q) in enumerate(plain_covariances(block, x)):
        torch.testing.assert_close(statistics.sums["P"][group], P.double(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.sums["Q"][group], Q.double(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_loudness_behind_a_layer_norm_and_a_gate_is_that_of_the_channel() -> None:
    """SS2D: what one channel of one direction gives is doubled, with the norm's statistics as they were."""
    torch.manual_seed(0)
    block, x = SS2D(8, 4), torch.randn(2, 3, 5, 8)
    block.out_norm.weight.copy_(torch.rand(16) + 0.5)
    (seen,) = calls_of(block, {"x": x})
    (call,) = seen.calls
    z = F.silu(block.in_proj(x).chunk(2, dim=-1)[1])
    y = block.scanned(block.act(block.conv2d(block.in_proj(x).chunk(2, dim=-1)[0].permute(0, 3, 1, 2))))
    scale = (y.var(dim=-1, correction=0, keepdim=True) + block.out_norm.eps).rsqrt()
    expected = (z * scale * block.out_norm.weight).abs() * block.out_proj.weight.norm(dim=0)  # (batch, 3, 5, channels)
    rows_first = expected.permute(0, 3, 1, 2).flatten(2)
    columns_first = expected.permute(0, 3, 2, 1).flatten(2)
    wanted = [rows_first, columns_first, rows_first.flip(-1), columns_first.flip(-1)]
    torch.testing.assert_close(call.gain, torch.cat(wanted, dim=1), rtol=1e-4, atol=1e-6)


def test_a_layer_without_a_recurrence_is_not_cut_as_what_its_class_says() -> None:
    model = MAMBA.build()
    mixer = find_layers(model)[0].module
    mixer.forward = lambda hidden_states, *_, **__: mixer.out_proj(mixer.in_proj(hidden_states).chunk(2, dim=-1)[0])
    plan = analyze(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    assert plan.layers[0].status == "skipped"
    assert "no recurrence was seen while it ran: its forward calls none of selective_scan_fn" in plan.layers[0].reason


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("constant", "its B or C is the same at every step"),
        ("complex", "its recurrence is complex"),
        ("another size", "its recurrence has 4 states, and its ssm_state_size is 8"),
        ("no output", "its out_proj did not run after its recurrence"),
    ],
)
def test_what_cannot_be_measured_is_left_alone_with_its_reason(
    fault: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MAMBA.build(num_hidden_layers=1)
    mixer = find_layers(model)[0].module
    u, vectors, A = torch.randn(3, 12, 12), torch.randn(3, 8, 12), -torch.rand(12, 8)

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        given = {
            "constant": (A, A, vectors),
            "complex": (A.to(torch.complex64), vectors, vectors),
            "another size": (A[:, :4], vectors[:, :4], vectors[:, :4]),
            "no output": (A, vectors, vectors),
        }[fault]
        y = modeling_mamba.mamba_selective_scan(u, u.abs(), *given).mT
        return hidden_states if fault == "no output" else mixer.out_proj(y)

    mixer.forward = forward
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", lambda u, delta, A, B, C, **_: u.clone())
    plan = analyze(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration(1))
    assert plan.layers[0].status == "skipped"
    assert reason in plan.layers[0].reason


def test_a_compiled_model_is_seen() -> None:
    model = MAMBA.build()
    expected = analyze(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    found = analyze(compiled, CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(one.hankel_singular_values, other.hankel_singular_values)


@pytest.mark.parametrize("family", [MAMBA, MAMBA2, S5_BIDIRECTIONAL], ids=family_id)
def test_the_fast_scan_in_place_of_the_stock_one_shows_the_same(family: Family) -> None:
    model, batch = family.build(), family.batch()
    before = [[call.arguments for call in seen.calls] for seen in calls_of(model, batch)]
    enable_fast_selective_scan()
    after = [[call.arguments for call in seen.calls] for seen in calls_of(model, batch)]
    for one, other in zip(before, after, strict=True):
        assert [each.keys() for each in one] == [each.keys() for each in other]
        assert len(one) == (2 if family is S5_BIDIRECTIONAL else 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", WATCHED)
def test_a_model_that_is_wrapped_or_split_is_seen_as_one_that_is_not(name: str, engine: str, tmp_path: Path) -> None:
    family = WATCHED[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "watch_run.py"), str(tmp_path), name, engine]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    model = family.build()
    for rank, found in enumerate(torch.load(tmp_path / "sums.pt", weights_only=True)):
        alone = watched(model, family)
        with watching(model, alone), torch.no_grad():
            model(**family.batch(seed=rank))
        for one, other in zip(sums(alone), found, strict=True):
            for key, value in one.items():
                torch.testing.assert_close(other[key], value, rtol=CLOSE, atol=CLOSE * float(value.abs().max()))
