"""`compat="best"` of linear attention: with its first cut a stock model moves into a class of this package."""

import importlib
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
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import find_layers
from hf_compressm.models import adopt, own_class
from hf_compressm.surgery.reshaping import reshape_model, skeleton
from tests.caches import as_cache, cache_of
from tests.compression.test_own_classes import LOAD_AS_CUSTOM_CODE
from tests.family_table import (
    BAILING_HYBRID,
    DELTA_NETS,
    KIMI_LINEAR,
    LARA_MINI,
    MINIMAX,
    OLMO_HYBRID,
    ONLY_OWN,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    QWEN4_EXP,
    Family,
    family_id,
    outputs,
    perturbed,
    present,
    same,
    token_batch,
    train_step,
)
from tests.trainers import callback_of, trainer_of


FULL = 16  # channels of a key head
ROUND_OFF = 2e-3
"""Of float32, after the gated norms of two layers with a small output."""
KINDS = present(QWEN3_NEXT, QWEN3_5, OLMO_HYBRID, KIMI_LINEAR, BAILING_HYBRID, MINIMAX)
"""One model type for each way in which the layers make their inputs."""
BEST = {"compat": "best", "refit_steps": 0}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


def families(*fast: Family) -> Any:
    """Runs a test on every model type, as a slow one where another is as good."""
    every = (*DELTA_NETS, *present(QWEN4_EXP), *ONLY_OWN)
    rows = [row if row in fast else pytest.param(row, marks=pytest.mark.slow) for row in every]
    return pytest.mark.parametrize("family", rows, ids=family_id)


def build(family: Family) -> nn.Module:
    model = family.build(state_size=FULL)
    for layer in model.modules():
        if isinstance(layer, MiniMaxLightningAttention):  # its buffers all say the same
            decays = (layer.get_slope_rate(), *layer.decay_factors(layer.get_slope_rate()))
            for name, value in zip(("slope_rate", "query_decay", "key_decay", "diagonal_decay"), decays, strict=True):
                getattr(layer, name).copy_(value)
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    return {layer.name: layer.module for layer in find_layers(model)}


def projections(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    return {name: layer._parameters[name] for name in layer.projections}


def sizes(model: nn.Module) -> list[int]:
    """Read off the parameters."""
    found = []
    for layer in layers(model).values():
        rows = {FULL if weight is None else weight.shape[1] for weight in projections(layer).values()}
        assert len(rows) == 1
        found += rows
    return found


def written_sizes(model: nn.Module) -> list[int]:
    """Of the layers with states, the first and the last of three."""
    found = [each.linear_key_head_dim for each in model.config.per_layer_config]
    return [found[0], found[2]]


def quieten(part: nn.Module, channels: slice, loudness: float) -> None:
    """Scale some channels of queries and keys in all layers of a part."""
    for layer in layers(part).values():
        with torch.no_grad():
            if isinstance(layer, MiniMaxLightningAttention):
                layer.qkv_proj.weight.view(2, 3, FULL, -1)[:, :2, channels] *= loudness
            else:
                layer.conv1d.weight[: 4 * FULL].view(4, FULL, -1)[:, channels] *= loudness


@families()
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
    shapes = {tuple(value.shape) for name, value in saved.items() if name.endswith(("state_proj", "B_proj", "C_proj"))}
    assert shapes == {(2, 6, FULL)}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))
    command = [sys.executable, "-W", "ignore", "-c", LOAD_AS_CUSTOM_CODE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


@families(*KINDS)
def test_a_change_of_coordinates_changes_nothing(family: Family) -> None:
    model = build(family)
    before = outputs(model, family.batch())
    adopt(model)
    if family is not MINIMAX:  # which runs a scan in place of its own loop
        assert_close(outputs(model, family.batch()), before, rtol=0, atol=0)
    rotation, stretched = torch.linalg.qr(torch.randn(2, FULL, FULL)).Q, torch.randn(2, FULL, FULL)
    for layer in layers(model).values():
        if family is MINIMAX:  # any pair whose product is the identity
            layer.B_proj, layer.C_proj = nn.Parameter(stretched), nn.Parameter(torch.linalg.inv(stretched).mT)
        elif family in ONLY_OWN:  # every state has a decay of its own
            layer.state_proj = nn.Parameter(torch.eye(FULL).repeat(2, 1, 1))
        else:
            layer.state_proj = nn.Parameter(rotation)
    assert_close(outputs(model, family.batch()), before, rtol=ROUND_OFF, atol=ROUND_OFF)


@families(*KINDS)
def test_channels_without_a_signal_are_cut_without_a_trace(family: Family) -> None:
    model = build(family)
    quieten(model, channels=slice(8, None), loudness=0)
    before = outputs(model, family.batch())
    result = compress(model, CompreSSMConfig(target_state_size=8, **BEST), family.calibration())
    assert sizes(model) == written_sizes(model) == [8, 8]
    assert all(layer.predicted_error < ROUND_OFF for layer in result.plan.layers)
    assert_close(outputs(model, family.batch()), before, rtol=ROUND_OFF, atol=ROUND_OFF)


@families(QWEN3_5, KIMI_LINEAR, MINIMAX)
def test_a_tolerance_gives_layers_sizes_of_their_own(family: Family, tmp_path: Path) -> None:
    model = build(family)
    quieten(next(iter(layers(model).values())), channels=slice(2, None), loudness=1e-2)
    result = compress(model, CompreSSMConfig(tolerance=0.05, min_reduction=0, **BEST), family.calibration())
    assert list(result.state_sizes_after.values()) == sizes(model) == written_sizes(model)
    assert sizes(model)[0] < sizes(model)[1]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sizes(loaded) == sizes(model)
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))


@pytest.mark.parametrize("family", [KIMI_LINEAR, MINIMAX], ids=family_id)
def test_a_stock_layer_without_a_size_of_its_own_is_left_alone_and_says_why(family: Family) -> None:
    model = build(family)
    before = outputs(model, family.batch())
    plan = compress(model, CompreSSMConfig(target_state_size=5), family.calibration()).plan
    assert {layer.status for layer in plan.layers} == {"skipped"}
    assert all('use compat="best"' in layer.reason for layer in plan.layers)
    assert torch.equal(outputs(model, family.batch()), before)


@pytest.mark.parametrize("family", [QWEN3_5, pytest.param(OLMO_HYBRID, marks=pytest.mark.slow)], ids=family_id)
def test_a_projection_loses_less_than_the_best_selection(family: Family) -> None:
    lost = {}
    for compat in ("stock", "best"):
        model = build(family)
        before = outputs(model, family.batch())
        compress(model, CompreSSMConfig(target_state_size=8, compat=compat, refit_steps=0), [family.batch()])
        lost[compat] = float((outputs(model, family.batch()) - before).norm())
    assert lost["best"] < lost["stock"]


@families(QWEN3_5, KIMI_LINEAR, MINIMAX)
def test_a_projected_layer_is_projected_again(family: Family) -> None:
    model = build(family)
    compress(model, CompreSSMConfig(target_state_size=9, **BEST), family.calibration())
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, family.batch())
    model.eval()
    compress(model, CompreSSMConfig(target_state_size=5), family.calibration(), optimizer)
    assert sizes(model) == [5, 5]
    for layer in layers(model).values():
        for weight in projections(layer).values():
            assert optimizer.state[weight]["exp_avg"].shape == (2, 5, FULL)
            assert optimizer.state[weight]["exp_avg_sq"].any()
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


@families(QWEN3_5)
def test_a_run_that_changed_its_class_resumes_into_a_stock_model(family: Family, tmp_path: Path) -> None:
    settings = {**BEST, "fraction": 0.5, "end": 2, "num_cuts": 1}
    whole = trainer_of(family, tmp_path, settings, model=build(family), **SAVING)
    whole.train()
    assert sizes(whole.model) == [8, 8]
    for step in (1, 3):
        trainer = trainer_of(family, tmp_path, settings, model=build(family), **SAVING)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert type(trainer.model) is type(whole.model)
        assert same(dict(trainer.model.state_dict()), dict(whole.model.state_dict()))
        assert same(trainer.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])


@families(*KINDS)
def test_a_model_goes_back_to_the_stock_class_without_a_trace(family: Family) -> None:
    model = build(family)
    wanted = skeleton(family.model_class, model.config)
    state, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    expected = outputs(model, family.batch())
    compress(model, CompreSSMConfig(target_state_size=5, **BEST), family.calibration())
    assert reshape_model(model, wanted)
    assert type(model) is family.model_class
    model.load_state_dict(state)
    assert torch.equal(outputs(model, family.batch()), expected)
    assert model.config.to_dict() == config
    fresh, found = dict(build(family).named_modules()), dict(model.named_modules())
    assert {name: type(part) for name, part in found.items()} == {name: type(part) for name, part in fresh.items()}
    for name, part in fresh.items():
        numbers = {key: value for key, value in vars(part).items() if type(value) is int}
        assert {key: vars(found[name])[key] for key in numbers} == numbers


@pytest.mark.parametrize("keep", ["smallest", "random"])
def test_ablations_keep_other_directions(keep: str) -> None:
    added = {}
    for each in ("largest", keep):
        model = build(QWEN3_5)
        before = outputs(model, QWEN3_5.batch())
        compress(model, CompreSSMConfig(target_state_size=8, keep=each, **BEST), [QWEN3_5.batch()])
        added[each] = float((outputs(model, QWEN3_5.batch()) - before).norm())
    assert added["largest"] < added[keep]


@pytest.mark.skipif(not present(LARA_MINI), reason="this transformers does not have it")
def test_a_loaded_model_is_saved_under_the_names_of_its_modules(tmp_path: Path) -> None:
    """The stock model remembers that its checkpoint fused them."""
    build(LARA_MINI).save_pretrained(tmp_path / "stock")
    assert any("linear_attn.in_proj.weight" in name for name in load_file(tmp_path / "stock" / "model.safetensors"))
    model = LARA_MINI.model_class.from_pretrained(tmp_path / "stock").eval()
    compress(model, CompreSSMConfig(target_state_size=5, **BEST), LARA_MINI.calibration())
    model.save_pretrained(tmp_path / "own")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert torch.equal(outputs(loaded, LARA_MINI.batch()), outputs(model, LARA_MINI.batch()))


@pytest.mark.parametrize("family", [QWEN3_5, KIMI_LINEAR, MINIMAX], ids=family_id)
def test_projections_have_the_dtype_of_the_layer(family: Family) -> None:
    model = build(family).to(torch.bfloat16)
    compress(model, CompreSSMConfig(target_state_size=4, **BEST), family.calibration())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(outputs(model, family.batch())).all()


@pytest.mark.parametrize("family", [QWEN3_5, KIMI_LINEAR, MINIMAX], ids=family_id)
def test_a_cache_from_before_the_cut_is_refused(family: Family) -> None:
    model, tokens = build(family), family.batch()["input_ids"]
    with torch.no_grad():
        cache = as_cache(model, cache_of(model(tokens, use_cache=True)))
    compress(model, CompreSSMConfig(target_state_size=4, **BEST), family.calibration())
    with pytest.raises(ValueError, match="holds 16 states for layer 0, which now has 4"):
        model(tokens[:, :1], **cache)


VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
    "patch_size": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [QWEN3_5, QWEN3_5_MOE], ids=family_id)
def test_a_model_that_sees_images_moves_with_its_text_model(family: Family, tmp_path: Path) -> None:
    module = importlib.import_module(family.model_class.__module__)
    stock = getattr(module, family.model_class.__name__.replace("CausalLM", "ConditionalGeneration"))
    config = stock.config_class(text_config=family.config(state_size=FULL).to_dict(), vision_config=VISION)
    torch.manual_seed(0)
    model = perturbed(stock(config)).eval()
    before, wanted = {name: value.clone() for name, value in model.state_dict().items()}, skeleton(stock, config)
    compress(model, CompreSSMConfig(target_state_size=6, **BEST), family.calibration())
    assert type(model) is own_class(stock)
    assert sizes(model) == [6, 6]
    assert model.config.text_config is model.model.language_model.config
    model.save_pretrained(tmp_path)
    expected = outputs(model, family.batch())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, family.batch()), expected)
    tokens = family.batch()["input_ids"]
    torch.save({"input_ids": tokens, "logits": expected}, tmp_path / "expected.pt")
    code = LOAD_AS_CUSTOM_CODE.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert reshape_model(model, wanted)
    assert type(model) is stock
    model.load_state_dict(before)
    assert model.config.to_dict() == config.to_dict()
