"""The keys of mLSTM layers, cut by balanced truncation that folds into the stock projections."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import xLSTMConfig, xLSTMForCausalLM
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.families import find_layers
from hf_compressm.families.family import CutMethod
from tests.families.measuring import run
from tests.family_table import XLSTM, outputs, perturbed, ssm_layers, states_of, token_batch
from tests.trainers import callback_of, trainer_of


EXACT = 1e-9
"""Relative; another basis of the keys, in float64."""
CLOSE = 1e-4
"""Relative; float32."""
FACTOR = 1.5
"""How far a measured error may lie from the predicted one, either way."""
KEYS_OF_16: dict[str, Any] = {"hidden_size": 64, "num_heads": 32, "qk_dim_factor": 8.0, "v_dim_factor": 4.0}
ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokens = torch.tensor(json.load(open(folder + "/tokens.json")))
with torch.no_grad():
    logits = model(tokens).logits
made = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
cached = model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **made)
whole = tokens
with torch.no_grad():
    for _ in range(6):
        whole = torch.cat([whole, model(whole).logits[:, -1:].argmax(-1)], dim=1)
assert torch.equal(cached, whole), (cached, whole)
assert not any(name.startswith("hf_compressm") for name in sys.modules)
torch.save(logits, folder + "/logits.pt")
"""


def built(seed: int = 0, **kwargs: Any) -> xLSTMForCausalLM:
    """A model with exactly the sizes that it is given."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"vocab_size": 13, "num_hidden_layers": 2, "ffn_proj_factor": 1.0, "chunk_size": 16}
        config = xLSTMConfig(**{**settings, "use_cache": False, "inference_state_dtype": "float32", **kwargs})
        return perturbed(xLSTMForCausalLM(config), 0.1).eval()


def calibration(count: int = 4, length: int = 48) -> list[dict[str, Tensor]]:
    return [token_batch(4, length, seed) for seed in range(count)]


def test_any_basis_of_the_keys_folds_in_exactly() -> None:
    (layer, *_) = find_layers(built(**KEYS_OF_16))
    module, method = layer.module.double(), CutMethod("empirical")
    x = torch.randn(3, 48, 64, dtype=torch.float64)
    seen = run(module, "empirical", (x, {}))
    read: list[Tensor] = []
    module.mlstm_backend.register_forward_hook(lambda _, args, result: read.append(result[0]))
    with torch.no_grad():
        module(x)
    (whole,) = find_layers(module)
    changes = whole.family.cut(whole, method, whole.family.measure(whole, method, seen), 16).changes
    for change in changes:
        assert not torch.allclose(change.parameter, change.value)
        change.parameter.data = change.value
    with torch.no_grad():
        module(x)
    assert float((read[1] - read[0]).norm() / read[0].norm()) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize(("size", "fraction"), [(6, 0.4), (8, 0.3)])
def test_trained_cut_twice_saved_and_read_by_transformers_alone(size: int, fraction: float, tmp_path: Path) -> None:
    settings = {"fraction": fraction, "num_cuts": 2, "end": 4}
    trainer = trainer_of(XLSTM, tmp_path / "run", settings, model=built(**KEYS_OF_16))
    trainer.train()
    assert [event.outcome for event in callback_of(trainer).events] == ["cut", "cut"]
    model = trainer.model.eval()
    assert model.config.qk_dim_factor == size * 32 / 64
    assert [states_of(layer) for layer in ssm_layers(model).values()] == [size, size]
    trainer.save_model(str(tmp_path))
    tokens = token_batch(2, 21)["input_ids"]
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    ("hidden", "heads", "keys", "wanted", "size"),
    [
        (64, 32, 16, 7, 8),  # 32 heads of 7 keys are no multiple of 64
        (64, 32, 16, 6, 6),
        (64, 4, 32, 20, 32),
        (96, 4, 32, 16, 16),
        (64, 4, 12, 5, 5),  # no cache fits a layer of 48 keys, before or after
        (49, 7, 9, 4, 4),
    ],
)
def test_sizes_are_those_whose_cache_fits(hidden: int, heads: int, keys: int, wanted: int, size: int) -> None:
    factor = math.nextafter(heads * keys / hidden, math.inf)
    model = built(hidden_size=hidden, num_heads=heads, qk_dim_factor=factor)
    plan = analyze(model, CompreSSMConfig(target_state_size=wanted), calibration())
    assert {layer.new_state_size for layer in plan.layers} == {size}
    compress(model, CompreSSMConfig(target_state_size=wanted), calibration())
    fresh = xLSTMForCausalLM(model.config)
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert (model.config.qk_head_dim == size) == (heads * size % 64 == 0)


@pytest.mark.parametrize("hidden", [48, 49, 63, 64, 100, 768, 1000, 4096])
def test_a_factor_is_found_for_every_width(hidden: int) -> None:
    (layer, *_) = find_layers(built(**KEYS_OF_16))
    module = copy.copy(layer.module)
    module.config = xLSTMConfig(hidden_size=hidden, num_heads=1)
    for size in range(1, 2 * hidden, 7):
        (factor,) = layer.family.configured(module, size).values()
        assert int(hidden * factor) == size


def inputs_and_outputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What every layer is given, and gives."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ssm_layers(model)}
    hooks = [
        layer.register_forward_hook(lambda _, args, result, name=name: seen[name].append((args[0], result[0])))
        for name, layer in ssm_layers(model).items()
    ]
    for batch in batches:
        outputs(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


def measured_errors(model: nn.Module, seen: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """Relative errors of the layers as they are now, on the same inputs."""
    errors = {}
    with torch.no_grad():
        for name, layer in ssm_layers(model).items():
            lost = sum(float((layer(given)[0] - wanted).square().sum()) for given, wanted in seen[name])
            errors[name] = (lost / sum(float(wanted.square().sum()) for _, wanted in seen[name])) ** 0.5
    return errors


@pytest.mark.parametrize("gate", [-10.0, 0.0])
@pytest.mark.parametrize("size", [8, 4])
def test_the_error_is_the_predicted_one_and_less_than_that_of_other_choices(gate: float, size: int) -> None:
    """Where the input gate is open the normaliser divides; where it is nearly closed, the norm's eps counts."""
    errors = {}
    for keep in ("largest", "random", "smallest"):
        model = built(hidden_size=64, num_heads=16, qk_dim_factor=4.0, v_dim_factor=4.0)
        for layer in ssm_layers(model).values():
            layer.igate_preact.bias.data.fill_(gate)
        seen = inputs_and_outputs(model, [token_batch(8, 48, seed) for seed in (50, 51)])
        result = compress(model, CompreSSMConfig(target_state_size=size, keep=keep), calibration(8))
        found = measured_errors(model, seen)
        for plan in result.plan.layers:
            assert plan.predicted_error / FACTOR < found[plan.name] < plan.predicted_error * FACTOR
        errors[keep] = sum(found.values())
    assert errors["largest"] < errors["random"] < errors["smallest"]


def test_adapters_of_queries_and_keys_follow_exactly() -> None:
    def wrapped() -> Any:
        torch.manual_seed(1)
        adapters = LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False)
        return get_peft_model(built(**KEYS_OF_16), adapters).eval()

    settings, batch = CompreSSMConfig(target_state_size=6), token_batch(3, 40)
    merged, model = wrapped().merge_and_unload(), wrapped()
    compress(merged, settings, calibration())
    compress(model, settings, calibration())
    torch.testing.assert_close(outputs(model, batch), outputs(merged, batch), rtol=CLOSE, atol=CLOSE)


class Fused(nn.Module):
    """Layers whose projections are one; transformers cannot initialise a whole model of them."""

    def __init__(self, config: xLSTMConfig) -> None:
        super().__init__()
        self.layer = xLSTMLayer(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def test_one_projection_for_all_is_cut_as_several_are() -> None:
    config = xLSTMConfig(**KEYS_OF_16, chunk_size=16, use_bias=True)
    torch.manual_seed(0)
    single = perturbed(Fused(config), 0.1)
    fused = Fused(xLSTMConfig(**{**config.to_dict(), "weight_mode": "fused"}))
    parts = ("q", "k", "v", "ogate_preact")
    with torch.no_grad():
        for own in ("weight", "bias"):
            joined = torch.cat([getattr(getattr(single.layer, part), own) for part in parts])
            getattr(fused.layer.qkv_opreact, own).copy_(joined)
            gates = [getattr(getattr(single.layer, part), own) for part in ("igate_preact", "fgate_preact")]
            getattr(fused.layer.ifgate_preact, own).copy_(torch.cat(gates))
        for part in ("multihead_norm", "out_proj"):
            getattr(fused.layer, part).load_state_dict(getattr(single.layer, part).state_dict())
    x = torch.randn(3, 40, 64)
    for model in (single, fused):
        compress(model, CompreSSMConfig(target_state_size=6), [{"x": x}])
        assert (states_of(model.layer), model.layer.config.qk_dim_factor) == (6, 3.0)
    torch.testing.assert_close(fused(x), single(x), rtol=CLOSE, atol=CLOSE)


def test_a_forward_of_its_own_stays_with_the_backend() -> None:
    model = built(**KEYS_OF_16)
    (backend, *_) = [layer.mlstm_backend for layer in ssm_layers(model).values()]
    forward = backend.forward
    backend.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    own = backend.forward
    assert compress(model, CompreSSMConfig(target_state_size=6), calibration(1)).changed
    assert vars(backend)["forward"] is own
    assert not any("forward" in vars(layer.mlstm_backend) for layer in list(ssm_layers(model).values())[1:])
