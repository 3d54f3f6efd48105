"""Every Mamba family: what is measured is what the stock layer scans, and what is cut is an ordinary smaller model."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress, plan_compression
from hf_compressm.families import find_layers
from tests.families.measuring import signals_of
from tests.family_table import (
    BAMBA,
    FALCON_H1,
    FALCON_MAMBA,
    GRANITE,
    JAMBA,
    LAYERS,
    MAMBA,
    MAMBA2,
    MAMBA_FAMILIES,
    NEMOTRON_H,
    ZAMBA,
    ZAMBA2,
    Family,
    family_id,
    outputs,
    ssm_layers,
    token_batch,
)
from tests.stock_configs import GROUP_FIELDS, OTHER_BIASES, UNCLAMPED


SINGLE = 1e-4
"""Relative; float32 sums in another order."""
BFLOAT16 = 0.05
"""Relative; a few roundings to 8 bits in every layer."""
every_mamba = pytest.mark.parametrize("family", MAMBA_FAMILIES, ids=family_id)


def scans_of(model: torch.nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the stock scan functions return without feed-through and gate, `(batch, length, channels)` per call."""
    module = importlib.import_module(type(next(iter(ssm_layers(model).values()))).__module__)
    name = "mamba_selective_scan" if hasattr(module, "mamba_selective_scan") else "mamba2_chunk_scan"
    stock, found = getattr(module, name), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        bare = stock(*args, **{**kwargs, "D": None, "z": None})
        bare = bare[0] if isinstance(bare, tuple) else bare
        found.append(bare.mT if name == "mamba_selective_scan" else bare.flatten(2))
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    outputs(model, batch)
    return found


@every_mamba
@torch.no_grad()
def test_the_measured_states_read_out_are_the_stock_scan(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family.build()
    batch = token_batch(2, 23)
    batch["attention_mask"] = torch.ones(2, 23, dtype=torch.long)
    batch["attention_mask"][0, :4] = 0
    stock = scans_of(model, batch, monkeypatch)
    heads = 2 if family is ZAMBA else 1
    expected = [torch.cat(stock[i : i + heads], dim=-1) for i in range(0, len(stock), heads)]
    assert len(expected) == LAYERS
    real = batch["attention_mask"].bool()
    for calls, wanted in zip(signals_of(model, batch), expected, strict=True):
        found, gains = [], []
        for seen in calls:
            states = torch.cat([chunk.clone() for chunk in seen.states])  # (length, batch, groups, channels, N)
            found.append(torch.einsum("lbgcn,blgn->blgc", states, seen.C).flatten(2))
            gains.append(seen.gain.transpose(0, 1).flatten(2))
            assert torch.equal(seen.mask.bool(), real)
        together = torch.cat(found, dim=-1)
        torch.testing.assert_close(together[real], wanted[real], rtol=SINGLE, atol=1e-4 * float(wanted.abs().max()))
        assert (torch.cat(gains, dim=-1)[~real] == 0).all()


@every_mamba
@torch.no_grad()
def test_the_gain_is_that_from_the_scan_to_the_output(family: Family) -> None:
    """Scale each channel's read-out energy by its gain: that is the layer's output energy where outputs do not mix."""
    model = family.build()
    layer = find_layers(model)[0]
    out = layer.module.out_proj
    out.weight.copy_(torch.eye(out.weight.shape[0], out.weight.shape[1]))  # shows the first channels
    shown = out.weight.shape[0]
    if getattr(layer.module, "D", None) is not None:
        layer.module.D.zero_()
    if out.bias is not None:
        out.bias.zero_()
    shown_outputs: list[Tensor] = []
    layer.module.register_forward_hook(lambda module, args, result: shown_outputs.append(result))
    batch = token_batch(2, 9)
    found = []
    for seen in signals_of(model, {"input_ids": batch["input_ids"]})[0]:
        states = torch.cat([chunk.clone() for chunk in seen.states])
        y = torch.einsum("lbgcn,blgn->lbgc", states, seen.C)
        found.append((y * seen.gain).abs().flatten(2).transpose(0, 1))
    expected, together = shown_outputs[0].abs(), torch.cat(found, dim=-1)[..., :shown]
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def assert_loads_as_itself(model: Any, family: Family, folder: Path) -> None:
    """Saved and loaded by transformers, the model has its weights' dtype, computes the same and generates."""
    model.save_pretrained(folder)
    loaded = family.model_class.from_pretrained(folder)
    assert [parameter.dtype for parameter in loaded.parameters()] == [p.dtype for p in model.parameters()]
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))
    tokens = token_batch(2, 5)["input_ids"]
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert loaded.generate(tokens, attention_mask=torch.ones_like(tokens), **settings).shape == (2, 8)


LOAD_WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["hf_compressm"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = torch.load(folder + "/expected.pt", weights_only=True)
    assert type(model).__module__.startswith("transformers.models."), folder
    tokens = saved["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, saved["logits"], rtol=1e-4, atol=1e-4), folder
        generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), eos_token_id=None, **settings)
        full = model(generated.sequences).logits[:, tokens.shape[1] - 1 : -1]
    assert generated.sequences.shape[1] == tokens.shape[1] + 5, folder
    assert torch.allclose(torch.stack(generated.logits, dim=1), full, rtol=1e-4, atol=1e-4), folder
    checked = folder
print(checked)
"""


@pytest.mark.slow
def test_every_family_cut_from_16_to_6_is_a_model_of_plain_transformers(tmp_path: Path) -> None:
    folders = []
    for family in MAMBA_FAMILIES:
        model = family.build(state_size=16, **UNCLAMPED.get(family.family, {}))
        result = compress(model, CompreSSMConfig(target_state_size=6), family.calibration())
        assert set(result.state_sizes_after.values()) == {6}
        assert type(model) is family.model_class
        folder = tmp_path / family.name
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())[family.size_field] == 6
        tokens = token_batch(2, 6)["input_ids"]
        torch.save({"input_ids": tokens, "logits": outputs(model, {"input_ids": tokens})}, folder / "expected.pt")
        folders.append(str(folder))
    command = [sys.executable, "-W", "ignore", "-c", LOAD_WITHOUT_THE_PACKAGE, *folders]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(folders[-1])


@pytest.mark.parametrize("family", [MAMBA, JAMBA, MAMBA2], ids=family_id)
def test_thirty_steps_in_trainer_with_two_cuts(family: Family, tmp_path: Path) -> None:
    model = family.build(state_size=16).train()
    data = [{key: value[0] for key, value in token_batch(1, 12, seed).items()} for seed in range(60)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = CompreSSMCallback(CompreSSMConfig(fraction=0.5, start=0, end=20, num_cuts=2, calibration_batches=2))
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    result = trainer.train()
    assert [event.step for event in callback.events] == [10, 20]
    assert getattr(model.config, family.size_field) == 4
    assert {layer.state_size for layer in find_layers(model)} == {4}
    assert torch.isfinite(torch.tensor(result.training_loss))
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@every_mamba
@pytest.mark.parametrize(
    ("before", "settings", "after"),
    [(13, {"target_state_size": 7}, 7), (24, {"fraction": 0.5, "round_to": 8}, 16), (16, {"target_state_size": 1}, 1)],
    ids=["odd", "12 rounded up to a multiple of 8", "one"],
)
def test_odd_sizes_and_multiples(family: Family, before: int, settings: dict, after: int, tmp_path: Path) -> None:
    model = family.build(state_size=before)
    result = compress(model, CompreSSMConfig(**settings), family.calibration())
    assert set(result.state_sizes_after.values()) == {after}
    assert_loads_as_itself(model, family, tmp_path)


@every_mamba
def test_biases_the_other_way_round(family: Family, tmp_path: Path) -> None:
    model = family.build(state_size=16, **OTHER_BIASES[family.family])
    compress(model, CompreSSMConfig(target_state_size=6), family.calibration())
    for layer in ssm_layers(model).values():
        assert layer.out_proj.bias is not None
        assert (layer.conv1d.bias is None) is (family is not ZAMBA2)
        if getattr(layer, "in_proj", None) is not None:
            assert layer.in_proj.bias.shape[0] == layer.in_proj.weight.shape[0]
    assert_loads_as_itself(model, family, tmp_path)


@every_mamba
def test_weights_in_bfloat16_are_saved_and_loaded_as_such(family: Family, tmp_path: Path) -> None:
    family.build(state_size=16).save_pretrained(tmp_path)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = family.model_class.from_pretrained(tmp_path, dtype=dtype)
        before, dtypes = outputs(model, family.batch()), [parameter.dtype for parameter in model.parameters()]
        assert dtype in dtypes  # transformers keeps parts of Zamba in float32
        compress(model, CompreSSMConfig(target_state_size=14), family.calibration())
        assert [parameter.dtype for parameter in model.parameters()] == dtypes
        errors[dtype] = float((outputs(model, family.batch()) - before).norm() / before.norm())
    assert errors[torch.bfloat16] < errors[torch.float32] + BFLOAT16
    assert_loads_as_itself(model, family, tmp_path)


@pytest.mark.parametrize("family", [FALCON_MAMBA, JAMBA], ids=family_id)
@torch.no_grad()
def test_the_factor_that_normalisation_gets_wrong_is_folded(family: Family) -> None:
    """Entries of one size: dropping half changes the root mean square by nothing else than a factor."""
    model = family.build(torch.float32)
    for layer in ssm_layers(model).values():
        size, rank = 8, layer.time_step_rank
        rows = layer.x_proj.weight
        for start in (rank, rank + size):  # states come in equal pairs: one of each is all that is needed
            rows[start + 1 : start + size : 2] = rows[start : start + size : 2]
        layer.A_log[:, 1::2] = layer.A_log[:, ::2]
        for norm in (layer.b_layernorm, layer.c_layernorm):
            norm.weight[1::2] = norm.weight[::2]
    before = outputs(model, family.batch())
    result = compress(model, CompreSSMConfig(target_state_size=4), family.calibration())
    assert all(layer.predicted_error < 1e-2 for layer in result.plan.layers)
    after = outputs(model, family.batch())
    assert float((after - before).norm() / before.norm()) < 1e-2


@pytest.mark.parametrize("family", [MAMBA2, BAMBA, ZAMBA2, FALCON_H1, GRANITE, NEMOTRON_H], ids=family_id)
@pytest.mark.parametrize("number", [1, 2, 4])
@torch.no_grad()
def test_states_that_are_never_written_go_without_a_trace(family: Family, number: int) -> None:
    model = family.build(**{GROUP_FIELDS[family.family]: number})
    for layer in ssm_layers(model).values():
        inner, size = layer.intermediate_size, layer.ssm_state_size
        assert layer.n_groups == number
        for group in range(number):  # another half in every group
            dead = inner + group * size + torch.arange(group % 2, size, 2)
            layer.conv1d.weight[dead] = 0
            layer.conv1d.bias[dead] = 0
    before = outputs(model, family.batch())
    result = compress(model, CompreSSMConfig(target_state_size=4), family.calibration())
    assert all(layer.predicted_error < 1e-3 for layer in result.plan.layers)
    torch.testing.assert_close(outputs(model, family.batch()), before, rtol=1e-4, atol=1e-4)


@every_mamba
def test_the_error_at_a_size_is_what_the_cut_predicts_and_falls_with_size(family: Family) -> None:
    model = family.build()
    found = [
        [
            layer.predicted_error
            for layer in plan_compression(model, CompreSSMConfig(target_state_size=size), family.calibration()).layers
        ]
        for size in (2, 4, 6)
    ]
    assert all(0 <= error <= 1 for errors in found for error in errors)
    assert sum(found[0]) > sum(found[1]) > sum(found[2])
