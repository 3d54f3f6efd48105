import copy
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hf_compressm.models import CompreSSMamba2Mixer, adopt, own_class, own_config_class
from hf_compressm.models.modeling_compressm_mamba import CompreSSMambaBlock, CompreSSMambaMixer
from tests.models.cases import LRU, VOCAB_SIZE, enable_checkpointing, tokens
from tests.models.cases_mamba import MAMBA, MAMBA2, MAMBA_FAMILIES


families = pytest.mark.parametrize("family", MAMBA_FAMILIES, ids=lambda family: family.name)
STEPS = 3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for step in range(steps):
        x = tokens(2, 6) if step else torch.arange(1, 7).repeat(2, 1)
        model(x, labels=x).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@families
def test_the_classes_of_a_family(family):
    pairs = [(family.stock_model, family.model_class), (family.stock_causal, family.causal_class)]
    for stock, own in pairs:
        assert own_class(stock) is own_class(own) is own
    assert own_config_class(family.stock_config) is own_config_class(family.config_class) is family.config_class
    assert own_class(Mamba2Mixer) is own_class(CompreSSMamba2Mixer) is CompreSSMamba2Mixer
    assert own_class(MambaMixer) is own_class(CompreSSMambaMixer) is CompreSSMambaMixer
    assert own_class(MambaBlock) is own_class(CompreSSMambaBlock) is CompreSSMambaBlock
    assert own_class(nn.Linear) is None
    assert own_class(type("Sub", (family.stock_causal,), {})) is None
    assert own_config_class(LlamaConfig) is None


@families
@pytest.mark.parametrize("part", ["language model", "backbone"])
def test_an_adopted_model_is_saved_and_loaded_as_itself(family, part, tmp_path):
    model, x = family.stock(), tokens()
    model = model if part == "language model" else model.backbone
    expected, generation = model(x)[0], copy.deepcopy(getattr(model, "generation_config", None))
    adopt(model)
    own = family.causal_class if part == "language model" else family.model_class
    assert type(model) is own
    assert_close(model(x)[0], expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = own.from_pretrained(tmp_path)
    assert_close(loaded(x)[0], expected, rtol=0, atol=0)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [own.__name__]
    assert written["model_type"] == family.config_class.model_type
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    if generation is not None:
        assert model.generation_config.to_dict() == generation.to_dict()
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is own
    fresh = own(family.config(per_layer_config=None))
    assert [type(a) for a in model.modules()] == [type(a) for a in fresh.modules()]
    assert model._no_split_modules == fresh._no_split_modules


@families
def test_a_model_from_a_stock_checkpoint_is_adopted_or_loaded(family, tmp_path):
    stock, x = family.stock(), tokens()
    stock.save_pretrained(tmp_path)
    adopted = family.stock_causal.from_pretrained(tmp_path)
    adopt(adopted)
    loaded = family.causal_class.from_pretrained(tmp_path)
    for model in (adopted, loaded):
        assert model.config.model_type == family.config_class.model_type
        assert_close(model(x).logits, stock(x).logits, rtol=0, atol=0)
        model.save_pretrained(tmp_path / "own")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
        assert type(again) is family.causal_class
        assert_close(again(x).logits, stock(x).logits, rtol=0, atol=0)


@families
def test_nothing_but_classes_changes(family):
    model, x = family.stock().train(), tokens()
    model.backbone.layers[0].eval()
    model(x, labels=x).loss.backward()
    calls = []
    mixer = model.backbone.layers[1].mixer
    mixer.register_forward_hook(lambda *_: calls.append("hook"))
    mixer.A_log.register_hook(lambda *_: calls.append("gradient"))
    model.register_buffer("extra", torch.ones(2))
    parameters = [(name, id(p), id(p.grad), p.data_ptr(), p._version) for name, p in model.named_parameters()]
    modules, modes = [id(module) for module in model.modules()], [module.training for module in model.modules()]
    state, config, generation = copy.deepcopy(model.state_dict()), model.config, model.generation_config
    fields = config.to_dict()
    adopt(model)
    found = [(name, id(p), id(p.grad), p.data_ptr(), p._version) for name, p in model.named_parameters()]
    assert found == parameters
    assert [id(module) for module in model.modules()] == modules
    assert [module.training for module in model.modules()] == modes
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.generation_config is generation
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(config)}
    assert type(config) is family.config_class
    written = config.to_dict()
    assert {key: written[key] for key in fields if key != "model_type"} == {
        key: value for key, value in fields.items() if key != "model_type"
    }
    model(x, labels=x).loss.backward()
    assert sorted(calls) == ["gradient", "hook"]


@families
def test_training_goes_on_as_if_nothing_had_happened(family):
    """With the optimizer, its moments and the checkpointed blocks that were there."""
    models = [family.stock(), family.stock()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        enable_checkpointing(model)
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, STEPS)
        if model is models[1]:
            adopt(model)
        train(model, optimizer, STEPS)
    assert type(models[1]) is not type(models[0])
    assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)


@families
def test_an_own_model_is_left_alone(family):
    model = family.stock()
    adopt(model)
    before = {id(module): dict(vars(module)) for module in model.modules()}
    adopt(model)
    assert all(vars(module) == before[id(module)] for module in model.modules())
    adopt(family.causal_model())


def test_an_adopted_mixer_can_be_given_a_projection():
    model, x = MAMBA2.stock(), tokens()
    expected = model(x).logits
    adopt(model)
    for layer in model.backbone.layers:
        for name in ("B_proj", "C_proj"):
            setattr(layer.mixer, name, nn.Parameter(torch.eye(6).repeat(2, 1, 1)))
    model.config.conv_state_size = 6
    assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    fresh = MAMBA2.causal_class(MAMBA2.config(conv_state_size=6))
    fresh.load_state_dict(model.state_dict())


class Wrapper(MambaForCausalLM):
    """A class of somebody else's."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "The model is a Linear.*only MambaModel, MambaForCausalLM, Mamba2Model"),
        (LRU.causal_model, "The model is a LRUForCausalLM"),
        (lambda: Wrapper(MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=4, num_hidden_layers=1)), "is a Wrapper"),
    ],
)
def test_other_classes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        adopt(build())


def replace_mixer(model: nn.Module) -> None:
    model.backbone.layers[2].mixer = nn.Identity()


def hook_forward(model: nn.Module) -> None:
    mixer = model.backbone.layers[2].mixer
    mixer.forward = mixer.forward


def take_the_name(model: nn.Module) -> None:
    model.backbone.layers[2].mixer.C_proj = nn.Linear(1, 1)


def swap_the_config(model: nn.Module) -> None:
    model.backbone.config = LlamaConfig()


@pytest.mark.parametrize(
    ("family", "spoil", "message"),
    [
        (MAMBA, replace_mixer, "Layer 2 has a module of class Identity"),
        (MAMBA, swap_the_config, "configuration is a LlamaConfig"),
        (MAMBA2, replace_mixer, "Layer 2 has a module of class Identity"),
        (MAMBA2, swap_the_config, "configuration is a LlamaConfig"),
        (MAMBA2, hook_forward, "layers.2.mixer has a `forward` of its own.*remove_hook_from_submodules"),
        (MAMBA2, take_the_name, "layers.2.mixer already has C_proj"),
    ],
)
def test_a_model_that_cannot_be_adopted_is_left_as_it_was(family, spoil, message):
    model = family.stock()
    spoil(model)
    classes, fields = [type(module) for module in model.modules()], [set(vars(m)) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adopt(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == fields
    assert type(model.config) is family.stock_config
    assert not hasattr(model.config, "conv_state_size")
