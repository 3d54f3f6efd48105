"""Mamba cuts: streamed statistics against a plain loop, padding, selection and its predicted error."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compressm import CompreSSMConfig, compress, enable_fast_selective_scan, plan_compression
from hf_compressm.families import find_layers
from hf_compressm.scans import disable_fast_selective_scan
from tests.families.measuring import calls_of, run
from tests.family_table import MAMBA, outputs, ssm_layers, token_batch


SINGLE = 1e-4
"""Relative; float32 sums in another order."""


def mixer_inputs(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for layer in ssm_layers(model).values()
    ]
    outputs(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def plain_states(mixer: torch.nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States `(length, channels, N)`, C `(length, N)` and gate `(length, channels)` of one sequence, step by step."""
    u, z = mixer.in_proj(hidden[None]).mT.chunk(2, dim=1)
    u = F.silu(mixer.conv1d(u)[..., : hidden.shape[0]])[0].T
    step, B, C = mixer.x_proj(u).split([2, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    delta = F.softplus(mixer.dt_proj(step))
    h, states = torch.zeros_like(mixer.A_log), []
    for t in range(hidden.shape[0]):
        decay = torch.exp(-delta[t][:, None] * mixer.A_log.exp())
        h = decay * h + (delta[t] * u[t])[:, None] * B[t]
        states.append(h)
    return torch.stack(states), C, z[0].T


@pytest.mark.parametrize(("bias", "every"), [(False, 1), (True, 1), (True, 2), (True, 8)])
@torch.no_grad()
def test_streamed_covariances_are_those_of_a_plain_loop(
    bias: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_compressm.families.calls.sample", lambda *_, **__: (slice(None), every))
    model = MAMBA.build(use_bias=bias)
    for mixer, hidden in zip(ssm_layers(model).values(), mixer_inputs(model, token_batch(3, 37)), strict=True):
        P, Q = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
        for sequence in hidden:
            states, C, gate = plain_states(mixer, sequence)
            loud = F.silu(gate).abs() * mixer.out_proj.weight.norm(dim=0)
            flat = (states * loud[..., None])[every - 1 :: every].reshape(-1, 8).double()
            P, Q = P + flat.T @ flat, Q + C.double().T @ C.double()
        statistics = run(mixer, "interpolative", (hidden, {}))
        torch.testing.assert_close(statistics.mean("P")[0], P / (3 * (37 // every)), rtol=SINGLE, atol=1e-5)
        torch.testing.assert_close(statistics.mean("Q")[0], Q / (3 * 37), rtol=SINGLE, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("criterion", ["interpolative", "surrogate"])
@torch.no_grad()
def test_padding_weighs_nothing(bias: bool, side: str, criterion: str) -> None:
    mixer = next(iter(ssm_layers(MAMBA.build(use_bias=bias)).values()))
    if side == "left" and mixer.use_conv_bias and criterion == "surrogate":
        mixer.conv1d.bias.zero_()
    real, junk = torch.randn(2, 9, 6), 10 * torch.randn(2, 4, 6)
    padded = torch.cat([junk, real] if side == "left" else [real, junk], dim=1)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[:, slice(0, 4) if side == "left" else slice(9, None)] = 0
    alone = run(mixer, criterion, (real, {}))
    with_padding = run(mixer, criterion, (padded, {"attention_mask": mask}))
    if bias and side == "left":
        return  # the stock layer lets its input bias pass into the convolution there
    assert alone.tokens == with_padding.tokens == 18
    for name, value in alone.sums.items():
        torch.testing.assert_close(with_padding.sums[name], value, rtol=SINGLE, atol=1e-5)


@torch.no_grad()
def test_under_autocast_the_statistics_keep_their_precision() -> None:
    model = MAMBA.build(num_hidden_layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        (seen,) = calls_of(model, {"input_ids": token_batch(2, 20)["input_ids"]})
        statistics = find_layers(model)[0].family.statistics(seen.module, "interpolative")
        statistics.observe(seen)
    C = seen.calls[0].arguments["C"].double().transpose(0, 1).reshape(8, -1)
    torch.testing.assert_close(statistics.sums["Q"][0], C @ C.T, rtol=1e-5, atol=1e-6)


def test_the_prediction_is_near_the_measured_error_and_interpolation_beats_plain_selection() -> None:
    """Measured as the plan defines it: energy of what the gated scan loses, over channels and tokens."""
    gains, ratios = [], []
    for seed in range(4):
        model = MAMBA.build(seed=seed, state_size=16, num_hidden_layers=1)
        batch = token_batch(8, 64, seed)
        hidden = mixer_inputs(model, batch)[0]
        before = outputs(model, batch)
        feed = {}
        for criterion in ("interpolative", "surrogate"):
            cut = MAMBA.build(seed=seed, state_size=16, num_hidden_layers=1)
            plan = compress(cut, CompreSSMConfig(target_state_size=6, criterion=criterion), [batch]).plan
            feed[criterion] = float((outputs(cut, batch) - before).norm())
            if criterion == "interpolative":
                old, new = (next(iter(ssm_layers(m).values())) for m in (model, cut))
                lost, total = 0.0, 0.0
                with torch.no_grad():
                    for sequence in hidden:
                        (h, C, gate), (h_new, C_new, _) = plain_states(old, sequence), plain_states(new, sequence)
                        loud = F.silu(gate).abs() * old.out_proj.weight.norm(dim=0)
                        full = torch.einsum("tdn,tn->td", h, C) * loud
                        less = torch.einsum("tdn,tn->td", h_new, C_new) * loud
                        lost, total = lost + float((full - less).square().sum()), total + float(full.square().sum())
                ratios.append((lost / total) ** 0.5 / plan.layers[0].predicted_error)
        gains.append(feed["surrogate"] / feed["interpolative"])
    assert all(0.3 < ratio < 3 for ratio in ratios), ratios
    assert sum(gains) / len(gains) > 1, gains


def test_the_fast_scan_and_the_stock_loop_agree_after_a_cut() -> None:
    model = MAMBA.build()
    compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    try:
        enable_fast_selective_scan()
        fast = outputs(model, token_batch())
    finally:
        disable_fast_selective_scan()
    torch.testing.assert_close(fast, outputs(model, token_batch()), rtol=SINGLE, atol=1e-5)


def test_a_kept_state_has_its_decay_unchanged() -> None:
    model = MAMBA.build()
    old = [layer.A_log.detach().clone() for layer in ssm_layers(model).values()]
    for entry, decay in zip(
        plan_compression(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration()).layers, old, strict=True
    ):
        new = next(change.value for change in entry.cut.changes if change.name.endswith("A_log"))
        assert all(any(torch.equal(column, other) for other in decay.double().T) for column in new.T)
