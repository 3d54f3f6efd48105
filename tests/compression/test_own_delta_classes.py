"""`compat="best"` of delta nets: with its first cut a stock model moves into a class that projects queries and keys."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.models import adopt, own_class
from hf_compressm.surgery.reshaping import reshape_model, skeleton
from tests.compression.test_own_classes import LOAD_AS_CUSTOM_CODE
from tests.family_table import (
    DELTA_NETS,
    LARA_MINI,
    OLMO_HYBRID,
    QWEN3_5,
    QWEN3_NEXT,
    QWEN4_EXP,
    Family,
    family_id,
    outputs,
    same,
    snapshot,
    ssm_layers,
    token_batch,
    train_step,
)
from tests.trainers import callback_of, trainer_of


FULL = 16  # channels of a key head
ROUND_OFF = 2e-3
"""Of float32, after the gated norms of two layers with a small output."""
OTHER_INPUTS = (QWEN3_NEXT, QWEN3_5, OLMO_HYBRID)
"""One model type for each way in which the layers make their inputs."""
BEST = {"compat": "best"}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


def delta_nets(*fast: Family) -> Any:
    """Runs a test on every model type, as a slow one where another is as good."""
    every = (*DELTA_NETS, QWEN4_EXP)
    rows = [row if row in fast else pytest.param(row, marks=pytest.mark.slow) for row in every]
    return pytest.mark.parametrize("family", rows, ids=family_id)


def build(family: Family) -> nn.Module:
    return family.build(state_size=FULL)


def sizes(model: nn.Module) -> list[int]:
    return [FULL if layer.state_proj is None else layer.state_proj.shape[1] for layer in ssm_layers(model).values()]


def written_sizes(model: nn.Module) -> list[tuple[int, int | None]]:
    """Of the delta nets, the first and the last of three layers."""
    found = [(each.linear_key_head_dim, each.conv_key_head_dim) for each in model.config.per_layer_config]
    return [found[0], found[2]]


@delta_nets(QWEN3_NEXT)
def test_thirty_steps_in_trainer_with_two_cuts_load_anywhere(family: Family, tmp_path: Path) -> None:
    settings = {**BEST, "target_state_size": 6, "end": 20, "num_cuts": 2}
    trainer = trainer_of(family, tmp_path / "run", settings, model=build(family).train(), max_steps=30)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    model = trainer.model
    assert [event.step for event in callback_of(trainer).events] == [10, 20]
    assert type(model) is own_class(family.model_class)
    assert sizes(model) == [6, 6]
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    folder = tmp_path / "end"
    trainer.save_model(folder)
    tokens = token_batch(2, 6)["input_ids"]
    torch.save({"input_ids": tokens, "logits": outputs(model.eval(), {"input_ids": tokens})}, folder / "expected.pt")
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == f"compressm_{family.config_class.model_type}"
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    saved = load_file(folder / "model.safetensors")
    assert saved["model.layers.0.linear_attn.state_proj"].shape == (2, 6, FULL)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))
    command = [sys.executable, "-W", "ignore", "-c", LOAD_AS_CUSTOM_CODE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


@delta_nets(*OTHER_INPUTS)
def test_a_rotation_of_all_states_changes_nothing(family: Family) -> None:
    model = build(family)
    before = outputs(model, family.batch())
    adopt(model)
    assert_close(outputs(model, family.batch()), before, rtol=0, atol=0)
    for layer in ssm_layers(model).values():
        layer.state_proj = nn.Parameter(torch.linalg.qr(torch.randn(2, FULL, FULL)).Q)
    assert_close(outputs(model, family.batch()), before, rtol=ROUND_OFF, atol=ROUND_OFF)


@delta_nets(QWEN3_5)
def test_a_tolerance_gives_layers_sizes_of_their_own(family: Family, tmp_path: Path) -> None:
    model = build(family)
    first = next(iter(ssm_layers(model).values()))
    with torch.no_grad():  # queries and keys of the first layer hardly leave a plane
        first.conv1d.weight[: 2 * first.key_dim].view(4, FULL, -1)[:, 2:] *= 1e-2
    result = compress(model, CompreSSMConfig(tolerance=0.2, min_reduction=0, **BEST), family.calibration())
    assert list(result.state_sizes_after.values()) == sizes(model)
    assert sizes(model)[0] < sizes(model)[1] < FULL
    assert written_sizes(model) == [(size, FULL) for size in sizes(model)]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sizes(loaded) == sizes(model)
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))


@delta_nets(QWEN3_5)
def test_a_projection_loses_less_than_the_best_selection(family: Family) -> None:
    lost = {}
    for compat in ("stock", "best"):
        model = build(family)
        before = outputs(model, family.batch())
        compress(model, CompreSSMConfig(target_state_size=8, compat=compat), [family.batch()])
        lost[compat] = float((outputs(model, family.batch()) - before).norm())
    assert lost["best"] < lost["stock"]


@delta_nets(QWEN3_5)
def test_a_projected_layer_is_projected_again(family: Family) -> None:
    model = build(family)
    compress(model, CompreSSMConfig(target_state_size=9, **BEST), family.calibration())
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, family.batch())
    model.eval()
    compress(model, CompreSSMConfig(target_state_size=5), family.calibration(), optimizer)
    assert sizes(model) == [5, 5]
    for layer in ssm_layers(model).values():
        assert optimizer.state[layer.state_proj]["exp_avg"].shape == (2, 5, FULL)
        assert optimizer.state[layer.state_proj]["exp_avg_sq"].any()


@delta_nets(QWEN3_5)
def test_a_run_that_changed_its_class_resumes_into_a_stock_model(family: Family, tmp_path: Path) -> None:
    settings = {**BEST, "fraction": 0.5, "end": 2, "num_cuts": 1}
    whole = trainer_of(family, tmp_path, settings, model=build(family), **SAVING)
    whole.train()
    assert sizes(whole.model) == [8, 8]
    for step in (1, 2, 3):
        trainer = trainer_of(family, tmp_path, settings, model=build(family), **SAVING)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert type(trainer.model) is type(whole.model)
        assert same(dict(trainer.model.state_dict()), dict(whole.model.state_dict()))
        assert same(trainer.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])


@delta_nets(*OTHER_INPUTS)
def test_a_model_goes_back_to_the_stock_class_without_a_trace(family: Family) -> None:
    model = build(family)
    before, wanted = snapshot(model), skeleton(family.model_class, model.config)
    expected = outputs(model, family.batch())
    compress(model, CompreSSMConfig(target_state_size=5, **BEST), family.calibration())
    assert reshape_model(model, wanted)
    assert type(model) is family.model_class
    model.load_state_dict(before["tensors"])
    assert_close(outputs(model, family.batch()), expected, rtol=0, atol=0)
    after = snapshot(model)
    assert same(after["tensors"], before["tensors"])
    assert after["config"] == before["config"]
    assert after["sizes"] == before["sizes"]


@pytest.mark.parametrize("keep", ["smallest", "random"])
def test_ablations_keep_other_directions(keep: str) -> None:
    added = {}
    for each in ("largest", keep):
        model = build(QWEN3_5)
        before = outputs(model, QWEN3_5.batch())
        compress(model, CompreSSMConfig(target_state_size=8, keep=each, **BEST), [QWEN3_5.batch()])
        added[each] = float((outputs(model, QWEN3_5.batch()) - before).norm())
    assert added["largest"] < added[keep]


def test_a_loaded_model_is_saved_under_the_names_of_its_modules(tmp_path: Path) -> None:
    """The stock model remembers that its checkpoint fused them."""
    build(LARA_MINI).save_pretrained(tmp_path / "stock")
    assert any("linear_attn.in_proj.weight" in name for name in load_file(tmp_path / "stock" / "model.safetensors"))
    model = LARA_MINI.model_class.from_pretrained(tmp_path / "stock").eval()
    compress(model, CompreSSMConfig(target_state_size=5, **BEST), LARA_MINI.calibration())
    model.save_pretrained(tmp_path / "own")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert torch.equal(outputs(loaded, LARA_MINI.batch()), outputs(model, LARA_MINI.batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_projections_have_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    model = build(QWEN3_5).to(dtype)
    compress(model, CompreSSMConfig(target_state_size=4, **BEST), QWEN3_5.calibration())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.isfinite(outputs(model, QWEN3_5.batch())).all()
