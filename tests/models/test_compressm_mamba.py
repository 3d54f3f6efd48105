"""What Mamba and Mamba-2 with a state size per layer have in common; the projection is in test_compressm_mamba2.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.caches import as_cache, cache_of
from tests.models.cases import enable_checkpointing, tokens
from tests.models.cases_mamba import MAMBA, MAMBA_FAMILIES, left_padded


TOLERANCE = 1e-5  # float32: a recurrence step by step against the scan of the whole sequence
BFLOAT16 = 0.1  # a few roundings to 8 bits on logits of size one
ROOT = Path(__file__).resolve().parents[2]

families = pytest.mark.parametrize("family", MAMBA_FAMILIES, ids=lambda family: family.name)

# Loads every exported model in a fresh process and compares it with what the process that saved it computed.
LOADER = """
import sys
from pathlib import Path
folder, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "with package":
    import hf_compressm.models
else:
    sys.modules["hf_compressm"] = None  # importing it now fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

if mode == "without trust":
    for name in ("mamba", "mamba2", "mamba2-base"):
        for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
            try:
                auto_class.from_pretrained(folder / name)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError(f"{auto_class.__name__} loaded {name}")
    print("refused")
    sys.exit()
trust = {"trust_remote_code": True} if mode == "with trust" else {}
home = "transformers_modules" if trust else "hf_compressm"
for name in ("mamba", "mamba2"):
    saved = torch.load(folder / f"{name}.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / name, **trust)
    assert type(model).__module__.startswith(home), type(model)
    torch.testing.assert_close(model(saved["x"]).logits, saved["logits"], rtol=1e-6, atol=1e-6)
    assert [layer.state_size for layer in model.config.per_layer_config] == [3, 6, 1]
    generated = model.generate(saved["x"], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, saved["generated"])
    model.save_pretrained(folder / f"{name} again")
    AutoModelForCausalLM.from_pretrained(folder / f"{name} again", **trust)
    for source in (name, f"{name}-base"):
        base = AutoModel.from_pretrained(folder / source, **trust)
        assert type(base).__module__.startswith(home), type(base)
        torch.testing.assert_close(base(saved["x"])[0], saved["hidden"], rtol=1e-6, atol=1e-6)
print("loaded")
"""


@families
def test_with_one_size_it_is_the_stock_model(family):
    torch.manual_seed(7)
    stock = family.stock()
    torch.manual_seed(7)
    own = family.causal_model(per_layer_config=None)
    assert list(own.state_dict()) == list(stock.state_dict())
    assert_close(own.state_dict(), stock.state_dict(), rtol=0, atol=0)
    other = family.causal_model(per_layer_config=None)
    other.load_state_dict(stock.state_dict())
    x = tokens()
    assert_close(other(x).logits, stock(x).logits, rtol=0, atol=0)
    base = family.model_class(own.config)
    assert list(base.state_dict()) == list(stock.backbone.state_dict())


@families
def test_each_layer_has_tensors_of_its_own_size(family):
    model = family.causal_model()
    for index, (layer, size) in enumerate(zip(model.backbone.layers, (3, 6, 1), strict=True)):
        mixer = layer.mixer
        assert mixer.ssm_state_size == model.config.per_layer_config[index].state_size == size
        if family is MAMBA:
            assert mixer.A_log.shape == (16, size)
            assert mixer.x_proj.weight.shape == (mixer.time_step_rank + 2 * size, 16)
        else:
            channels = 5 if index == 0 else size
            assert mixer.conv_state_size == channels
            assert mixer.conv_dim == mixer.conv1d.weight.shape[0] == 16 + 2 * 2 * channels
            assert mixer.in_proj.weight.shape == (16 + mixer.conv_dim + 4, 8)
    cache = cache_of(model(tokens(), use_cache=True))
    assert [layer.recurrent_states[0].shape[-1] for layer in cache.layers] == [3, 6, 1]


def test_a_smaller_layer_is_the_stock_layer_without_the_other_states():
    small, x = MAMBA.causal_model(), tokens()
    large = MAMBA.stock()
    state = small.state_dict()
    for index, layer in enumerate(large.backbone.layers):
        prefix, size = f"backbone.layers.{index}.mixer.", (3, 6, 1)[index]
        A_log, x_proj = layer.mixer.A_log.detach().clone(), torch.zeros_like(layer.mixer.x_proj.weight)
        rank = layer.mixer.time_step_rank
        A_log[:, :size] = state[f"{prefix}A_log"]
        rows = [*range(rank), *range(rank, rank + size), *range(rank + 6, rank + 6 + size)]
        x_proj[rows] = state[f"{prefix}x_proj.weight"]
        state[f"{prefix}A_log"], state[f"{prefix}x_proj.weight"] = A_log, x_proj
    large.load_state_dict(state)
    assert_close(small(x).logits, large(x).logits, rtol=TOLERANCE, atol=TOLERANCE)


@families
def test_decoding_from_a_cache_equals_the_whole_sequence(family):
    model, x = family.causal_model(), tokens()
    outputs = model(x[:, :4], use_cache=True)
    logits = [outputs.logits]
    for k in range(4, 9):
        outputs = model(x[:, k : k + 1], **as_cache(model, cache_of(outputs)), use_cache=True)
        logits.append(outputs.logits)
    assert_close(torch.cat(logits, dim=1), model(x).logits, rtol=TOLERANCE, atol=TOLERANCE)


@families
@pytest.mark.parametrize("strategy", [{"num_beams": 1}, {"num_beams": 3}], ids=str)
def test_generation_with_and_without_a_cache_agrees(family, strategy):
    model, x = family.causal_model(), tokens(2, 5)
    mask = torch.ones_like(x)
    sequences = [
        model.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use_cache, **strategy)
        for use_cache in (True, False)
    ]
    assert_close(sequences[0], sequences[1])
    assert sequences[0].shape[1] == 11


@families
def test_left_padding_changes_nothing(family):
    model, rows, lengths = family.causal_model(), tokens(2, 7), [7, 4]
    padded, mask = left_padded(rows, lengths)
    logits = model(padded, attention_mask=mask).logits
    settings = {"max_new_tokens": 5, "do_sample": False}
    generated = model.generate(padded, attention_mask=mask, **settings)
    for row, length, padded_logits, sequence in zip(rows, lengths, logits, generated, strict=True):
        alone = row[None, :length]
        assert_close(padded_logits[7 - length :], model(alone).logits[0], rtol=TOLERANCE, atol=TOLERANCE)
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert_close(sequence[7:], expected[0, length:])


@families
def test_bfloat16_is_float32_to_its_round_off(family):
    model, x = family.causal_model(), tokens()
    expected = model(x).logits
    logits = model.to(torch.bfloat16)(x).logits
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_close(logits, expected, rtol=BFLOAT16, atol=BFLOAT16 * expected.abs().max().item())
    outputs = model(x[:, :4], use_cache=True)
    model(x[:, 4:5], **as_cache(model, cache_of(outputs)), use_cache=True)
    model.train()(x, labels=x).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@families
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same_gradients(family, use_reentrant):
    model, x = family.causal_model().train(), tokens()
    model(x, labels=x).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    enable_checkpointing(model, use_reentrant)
    model.enable_input_require_grads()
    model(x, labels=x).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(gradients, expected, rtol=TOLERANCE, atol=TOLERANCE)


@families
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_model(family, tied, tmp_path):
    model, x = family.causal_model(tie_word_embeddings=tied), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is family.causal_class
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) is tied
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)
    assert loaded.config.to_dict()["per_layer_config"] == family.own_sizes
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is family.model_class
    assert_close(base(x)[0], model.backbone(x)[0], rtol=0, atol=0)


@families
def test_models_are_built_without_memory_on_the_meta_device(family):
    with torch.device("meta"):
        model = family.causal_class(family.config(per_layer_config=family.own_sizes))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@families
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"7": {"state_size": 2}}, r"range \[0, 3\); got \[7\]"),
        ({"1": {"state_size": 0}}, "`state_size` is 0 in layer 1; it must be a positive integer"),
        ({"1": {"hidden_size": 4}}, r"sets \['hidden_size'\], which all layers must share.*may have its own"),
        ({"1": {"skip": ["mixer"]}}, r"sets \['skip'\], which all layers must share"),
    ],
)
def test_sizes_that_cannot_be_are_refused(family, sizes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        family.config(per_layer_config=sizes)
    family.config(per_layer_config=family.own_sizes).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"per_layer_config": sizes}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@families
def test_a_config_that_was_made_wrong_later_builds_no_model(family, tmp_path):
    config = family.config(per_layer_config=family.own_sizes)
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"names layer 2, but `num_hidden_layers` is 2.*Remove the entry"):
        family.causal_class(config)
    config = family.config()
    config.state_size = 0
    with pytest.raises(ValueError, match="`state_size` is 0 in layer 0"):
        family.model_class(config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One folder with a language model and a backbone of each family, and beside them what they compute here."""
    folder = tmp_path_factory.mktemp("exported")
    for family in MAMBA_FAMILIES:
        torch.manual_seed(1)
        model, x = family.causal_model(), tokens(2, 6)
        model.save_pretrained(folder / family.name)
        model.backbone.save_pretrained(folder / f"{family.name}-base")
        saved = {"x": x, "logits": model(x).logits.detach(), "hidden": model.backbone(x)[0].detach()}
        saved["generated"] = model.generate(x, max_new_tokens=4, do_sample=False)
        torch.save(saved, folder / f"{family.name}.pt")
    return folder


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        pytest.param("with package", "loaded", marks=pytest.mark.slow),
        pytest.param("with trust", "loaded", marks=pytest.mark.slow),
        ("without trust", "refused"),
    ],
)
def test_a_saved_folder_in_another_process(exported, mode, answer, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    if mode != "with package":
        environment.pop("PYTHONPATH")
    process = subprocess.run(
        [sys.executable, "-c", LOADER, str(exported), mode],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,  # a prompt for trust would fail
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().endswith(answer)


@families
def test_the_exported_config_names_every_class_and_its_file_is_there(family, exported):
    for name in (family.name, f"{family.name}-base"):
        auto_map = json.loads((exported / name / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        assert all((exported / name / f"{target.split('.')[0]}.py").exists() for target in auto_map.values())
