"""Sizes per layer and projection: a stock Mamba or Mamba-2 moves into this package's class with its first such cut."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2Model, MambaModel, Trainer, TrainingArguments

from hf_compressm import (
    CompreSSMamba2ForCausalLM,
    CompreSSMambaForCausalLM,
    CompreSSMCallback,
    CompreSSMConfig,
    compress,
)
from tests.family_table import (
    BAMBA,
    MAMBA,
    MAMBA2,
    MAMBA2_PLAIN,
    Family,
    family_id,
    outputs,
    same,
    snapshot,
    ssm_layers,
    token_batch,
    train_step,
)


OWN = {MAMBA.family: CompreSSMambaForCausalLM, MAMBA2.family: CompreSSMamba2ForCausalLM}
with_own_class = pytest.mark.parametrize(
    "family", [MAMBA, MAMBA2, pytest.param(MAMBA2_PLAIN, marks=pytest.mark.slow)], ids=family_id
)
projecting = pytest.mark.parametrize("family", [MAMBA2, MAMBA2_PLAIN], ids=family_id)


def uneven(family: Family, **kwargs: object) -> nn.Module:
    """A model whose first layer needs fewer states than its second."""
    model = family.build(**kwargs)
    layer = next(iter(ssm_layers(model).values()))
    size = layer.ssm_state_size
    with torch.no_grad():
        if family is MAMBA:
            layer.x_proj.weight[2 + 2 : 2 + size] *= 1e-3
        else:
            for group in range(layer.n_groups):
                weak = layer.intermediate_size + group * size + torch.arange(2, size)
                layer.conv1d.weight[weak] *= 1e-3
                if layer.conv1d.bias is not None:
                    layer.conv1d.bias[weak] *= 1e-3
    return model


def state_sizes(model: nn.Module) -> list[int]:
    return [layer.ssm_state_size for layer in ssm_layers(model).values()]


def saved_sizes(folder: Path, config: Any) -> list[int]:
    """State sizes, read off nothing but the saved tensors."""
    tensors = load_file(folder / "model.safetensors")
    found = []
    for index in range(config.num_hidden_layers):
        layer = f"backbone.layers.{index}.mixer."
        if f"{layer}x_proj.weight" in tensors:
            found.append(tensors[f"{layer}A_log"].shape[1])
        elif f"{layer}B_proj" in tensors:
            found.append(tensors[f"{layer}B_proj"].shape[1])
        else:
            channels = tensors[f"{layer}conv1d.weight"].shape[0] - config.num_heads * config.head_dim
            found.append(channels // (2 * config.n_groups))
    return found


LOAD_AS_CUSTOM_CODE = """
import sys
sys.modules["hf_compressm"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
saved = torch.load(folder + "/expected.pt", weights_only=True)
tokens = saved["input_ids"]
with torch.no_grad():
    assert torch.allclose(model(tokens).logits, saved["logits"], rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(tokens)
    generated = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    full = model(generated).logits
assert torch.equal(full[:, tokens.shape[1] - 1 : -1].argmax(-1), generated[:, tokens.shape[1] :])
for auto_class in (AutoConfig, AutoModelForCausalLM):
    try:
        auto_class.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "contains custom code" in str(error) and "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without trust")
"""


@with_own_class
@pytest.mark.parametrize("compat", [pytest.param("stock", marks=pytest.mark.slow), "best"])
def test_a_tolerance_gives_layers_sizes_of_their_own(family: Family, compat: str, tmp_path: Path) -> None:
    model = uneven(family, state_size=16)
    weights = {name: parameter for name, parameter in model.named_parameters() if "ssm" not in name}
    settings = CompreSSMConfig(tolerance=0.1, per_layer=True, compat=compat)
    result = compress(model, settings, family.calibration())
    first, second = state_sizes(model)
    assert first < second
    assert list(result.state_sizes_after.values()) == [first, second]
    assert type(model) is OWN[family.family]
    assert [layer.state_size for layer in model.config.per_layer_config] == [first, second]
    same = [name for name, parameter in model.named_parameters() if weights.get(name) is parameter]
    assert "backbone.embeddings.weight" in same
    tokens = token_batch(2, 6)["input_ids"]
    torch.save({"input_ids": tokens, "logits": outputs(model, {"input_ids": tokens})}, tmp_path / "expected.pt")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))
    assert loaded.config.compressm == model.config.compressm
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == f"compressm_{family.family}"
    assert saved_sizes(tmp_path, loaded.config) == [first, second]
    command = [sys.executable, "-W", "ignore", "-c", LOAD_AS_CUSTOM_CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@with_own_class
def test_one_size_for_all_keeps_the_stock_class(family: Family) -> None:
    model = uneven(family, state_size=16)
    compress(model, CompreSSMConfig(tolerance=0.1, per_layer=False), family.calibration())
    assert type(model) is family.model_class
    assert type(model.config) is family.config_class
    assert not model.config.is_heterogeneous


@with_own_class
@pytest.mark.parametrize("compat", [pytest.param("stock", marks=pytest.mark.slow), "best"])
def test_thirty_steps_in_trainer_with_two_cuts_to_sizes_per_layer(family: Family, compat: str, tmp_path: Path) -> None:
    model = uneven(family, state_size=16).train()
    data = [{key: value[0] for key, value in token_batch(1, 12, seed).items()} for seed in range(60)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=30, per_device_train_batch_size=2, learning_rate=1e-3,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    settings = CompreSSMConfig(tolerance=0.2, per_layer=True, compat=compat, end=20, num_cuts=2, min_reduction=0)
    callback = CompreSSMCallback(settings)
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert [event.step for event in callback.events] == [10, 20]
    first, second = state_sizes(model)
    assert first < second < 16
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    trainer.save_model(tmp_path / "end")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert type(loaded) is OWN[family.family]
    assert saved_sizes(tmp_path / "end", loaded.config) == [first, second]
    assert torch.equal(outputs(loaded, family.batch()), outputs(model.eval(), family.batch()))


@projecting
@pytest.mark.parametrize("per_layer", [None, False])
def test_projection_is_predicted_to_lose_less_than_selection(family: Family, per_layer: bool | None) -> None:
    lost = {}
    for compat in ("stock", "best"):
        model = family.build(state_size=16)
        before = outputs(model, family.batch())
        settings = CompreSSMConfig(target_state_size=6, compat=compat, per_layer=per_layer)
        plan = compress(model, settings, [family.batch()]).plan
        error = float((outputs(model, family.batch()) - before).norm() / before.norm())
        lost[compat] = (sum(layer.predicted_error for layer in plan.layers), error)
    assert type(model) is CompreSSMamba2ForCausalLM
    assert lost["best"][0] < lost["stock"][0]
    assert lost["best"][1] < lost["stock"][1]
    layer = next(iter(ssm_layers(model).values()))
    assert layer.B_proj.shape == layer.C_proj.shape == (layer.n_groups, 6, 16)
    assert (model.config.state_size, model.config.conv_state_size) == (6, 16)


@with_own_class
@pytest.mark.parametrize("compat", ["stock", "best"])
def test_layers_are_cut_again_and_again(family: Family, compat: str) -> None:
    model = uneven(family, state_size=16)
    for tolerance in (0.1, 0.2, 0.3):
        before = state_sizes(model)
        settings = CompreSSMConfig(tolerance=tolerance, per_layer=True, compat=compat, min_reduction=0)
        result = compress(model, settings, family.calibration())
        assert list(result.state_sizes_after.values()) == state_sizes(model)
        assert sum(state_sizes(model)) < sum(before)
    assert torch.isfinite(outputs(model, family.batch())).all()


@projecting
def test_a_projected_layer_is_projected_again(family: Family, tmp_path: Path) -> None:
    model = family.build(state_size=16)
    compress(model, CompreSSMConfig(target_state_size=9, compat="best"), family.calibration())
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, family.batch())
    model.eval()
    compress(model, CompreSSMConfig(target_state_size=5), family.calibration(), optimizer)
    layer = next(iter(ssm_layers(model).values()))
    assert layer.B_proj.shape == (layer.n_groups, 5, 16)
    assert optimizer.state[layer.B_proj]["exp_avg"].shape == layer.B_proj.shape
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))


def test_states_that_others_repeat_project_away_without_a_trace() -> None:
    family = MAMBA2
    model = family.build(state_size=8)
    for layer in ssm_layers(model).values():
        inner, groups, size = layer.intermediate_size, layer.n_groups, layer.ssm_state_size
        rows = inner + torch.arange(groups * size)  # B: the second half of every group repeats its first
        source = inner + (torch.arange(groups)[:, None] * size + torch.arange(size) % 4).flatten()
        with torch.no_grad():
            layer.conv1d.weight[rows] = layer.conv1d.weight[source]
            layer.conv1d.bias[rows] = layer.conv1d.bias[source]
            start = layer.intermediate_size
            layer.in_proj.weight[start + rows] = layer.in_proj.weight[start + source]
    before = outputs(model, family.batch())
    compress(model, CompreSSMConfig(target_state_size=4, compat="best"), family.calibration())
    assert state_sizes(model) == [4, 4]
    torch.testing.assert_close(outputs(model, family.batch()), before, rtol=1e-4, atol=1e-4)


def test_parameters_that_appear_join_the_optimizer_where_a_fresh_one_has_them(tmp_path: Path) -> None:
    model = MAMBA2.build(state_size=16).train()
    data = [{key: value[0] for key, value in token_batch(1, 12, seed).items()} for seed in range(20)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    settings = CompreSSMConfig(fraction=0.5, end=6, num_cuts=2, compat="best", calibration_batches=2)
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[CompreSSMCallback(settings)])
    trainer.train()
    layer = next(iter(ssm_layers(model).values()))
    assert layer.B_proj.shape[1] == 4
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    present = [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]
    fresh = Trainer(model=model, args=args, train_dataset=data)
    fresh.create_optimizer()
    assert present == [[names[id(p)] for p in group["params"]] for group in fresh.optimizer.param_groups]
    inner = trainer.optimizer.optimizer
    assert inner.state[layer.B_proj]["exp_avg"].shape == layer.B_proj.shape
    assert inner.state[layer.B_proj]["exp_avg_sq"].any()


@pytest.mark.parametrize(("family", "base"), [(MAMBA, MambaModel), (MAMBA2, Mamba2Model)], ids=["mamba", "mamba2"])
def test_a_base_model_moves_too(family: Family, base: type, tmp_path: Path) -> None:
    model = base(family.config(state_size=16)).eval()
    settings = CompreSSMConfig(target_state_size=5, layers=["layers.0.mixer"], per_layer=True)
    compress(model, settings, [{"input_ids": token_batch()["input_ids"]}])
    assert state_sizes(model) == [5, 16]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    tokens = token_batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)


def test_best_where_there_is_no_own_class_is_the_stock_cut() -> None:
    model = BAMBA.build()
    compress(model, CompreSSMConfig(target_state_size=4, compat="best"), BAMBA.calibration())
    assert type(model) is BAMBA.model_class
    assert model.config.mamba_d_state == 4


@projecting
def test_a_model_that_cannot_move_is_left_as_it_was(family: Family) -> None:
    model = family.build()
    mixer = next(iter(ssm_layers(model).values()))
    mixer.forward = mixer.forward  # as accelerate's offload hooks do it
    before, optimizer = snapshot(model), torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"mixer.*forward"):
        compress(model, CompreSSMConfig(target_state_size=4, compat="best"), family.calibration(), optimizer)
    assert same(snapshot(model), before)
    assert type(model) is family.model_class
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_projections_beside_frozen_weights_are_frozen_and_outside_the_optimizer() -> None:
    model = MAMBA2.build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mixer" not in name)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    compress(model, CompreSSMConfig(target_state_size=4, compat="best"), MAMBA2.calibration(), optimizer)
    layer = next(iter(ssm_layers(model).values()))
    assert not layer.B_proj.requires_grad
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_projections_have_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    model = MAMBA2.build(dtype)
    compress(model, CompreSSMConfig(target_state_size=4, compat="best"), MAMBA2.calibration())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.isfinite(outputs(model, MAMBA2.batch())).all()
