"""LoRA on modules of which Mamba layers read only the weights: refused in own classes as in stock ones."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    RandLoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from hf_compressm.models import adopt
from tests.models.cases import tokens
from tests.models.cases_mamba import MAMBA_FAMILIES


families = pytest.mark.parametrize("family", MAMBA_FAMILIES, ids=lambda family: family.name)
own_or_adopted = pytest.mark.parametrize("origin", ["own", "adopted", "backbone"])


def make(family, origin):
    model = family.stock()
    if origin == "own":
        return family.causal_class(family.config())
    adopt(model)
    return model.backbone if origin == "backbone" else model


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning")
@families
@own_or_adopted
@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
def test_refused(family, origin, target):
    config = LoraConfig(target_modules=[target], r=80)  # peft takes grouped convolutions of such ranks only
    with pytest.raises(ValueError, match=f"Module '{target}' is incompatible"):  # what stock models get
        get_peft_model(family.stock(), config)
    with pytest.raises(ValueError, match=f"LoRA on '{target}' of a CompreSSM.* no effect.*from `target_modules`"):
        get_peft_model(make(family, origin), config)


@families
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules="all-linear"),
        LoraConfig(target_modules=["out_proj"], use_dora=True),
        AdaLoraConfig(target_modules=["out_proj"], total_step=10),
        RandLoraConfig(target_modules=["out_proj"], r=2),
    ],
    ids=["all-linear", "DoRA", "AdaLoRA", "RandLoRA"],
)
def test_other_ways_to_the_same_layer(family, config):
    with pytest.raises(ValueError, match="LoRA on 'out_proj'"):
        get_peft_model(make(family, "own"), config)
    with pytest.raises(ValueError, match="LoRA on 'out_proj'"):
        inject_adapter_in_model(config, make(family, "adopted"))


@families
@own_or_adopted
def test_allowed(family, origin, tmp_path):
    model = make(family, origin)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["in_proj"], init_lora_weights=False))
    x = tokens()
    expected = wrapped(x)[0]
    wrapped.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    again = make(family, origin)
    again.load_state_dict(state)
    torch.testing.assert_close(again(x)[0], expected, rtol=1e-4, atol=1e-5)
    assert PeftModel.from_pretrained(make(family, origin), tmp_path)
    ia3 = IA3Config(target_modules=["in_proj", "out_proj"], feedforward_modules=["out_proj"])
    assert get_peft_model(make(family, origin), ia3)  # which stock models take as well
