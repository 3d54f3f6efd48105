import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models.cases import FAMILIES, LRU, S5, VOCAB_SIZE, perturbed, tokens


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
PER_LAYER = {"per_layer_config": {"0": {"state_size": 4}}}
ROOT = Path(__file__).resolve().parents[2]
# The fallback recurrence sums in another order than the scan.
TOLERANCE = 1e-5

# Loads every exported model in a fresh process and compares it with what the process that saved it computed.
LOADER = """
import sys
from pathlib import Path
folder, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "without package":
    sys.modules["hf_compressm"] = None  # importing it now fails
else:
    import hf_compressm.models
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

trust = {"trust_remote_code": True} if mode == "without package" else {}
for name, auto_class in (
    ("s5", AutoModelForCausalLM), ("lru", AutoModelForCausalLM), ("two-way", AutoModelForSequenceClassification)
):
    model = auto_class.from_pretrained(folder / name, **trust)
    home = "transformers_modules" if trust else "hf_compressm"
    assert type(model).__module__.startswith(home), type(model)
    saved = torch.load(folder / f"{name}.pt")
    torch.testing.assert_close(model(saved["x"]).logits, saved["logits"], rtol=1e-5, atol=1e-5)
    assert model.config.per_layer_config[0].state_size == 4
    if "generated" in saved:
        generated = model.generate(saved["x"], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, saved["generated"])
    model.save_pretrained(folder / f"{name} again")
    auto_class.from_pretrained(folder / f"{name} again", **trust)
    AutoModel.from_pretrained(folder / name, **trust)
print("loaded")
"""


@families
@pytest.mark.parametrize("head", ["base", "classifier", "causal"])
def test_a_saved_model_is_the_same_model_through_the_auto_classes(family, head, tmp_path):
    model_class, auto_class, fields = {
        "base": (family.model_class, AutoModel, {"input_size": 2}),
        "classifier": (family.classifier_class, AutoModelForSequenceClassification, {"input_size": 2}),
        "causal": (family.causal_class, AutoModelForCausalLM, {"vocab_size": VOCAB_SIZE}),
    }[head]
    config = family.config(norm="batch", num_labels=3, **PER_LAYER, **fields)
    model = perturbed(model_class(config)).eval()
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert [layer.ssm.state_size for layer in loaded.modules() if hasattr(layer, "ssm")] == [
        4,
        config.per_layer_config[1].state_size,
    ]
    inputs = {"input_ids": tokens()} if head == "causal" else {"input_values": torch.randn(2, 5, 2)}
    assert_close(loaded(**inputs)[0], model(**inputs)[0], rtol=0, atol=0)


@families
def test_missing_weights_alone_are_initialised(family, tmp_path):
    """A backbone from a language model keeps its weights under a new head, which gets fresh ones."""
    model = family.causal_model()
    model.save_pretrained(tmp_path)
    classifier = family.classifier_class.from_pretrained(tmp_path, num_labels=5)
    assert_close(classifier.backbone.state_dict(), model.backbone.state_dict(), rtol=0, atol=0)
    assert classifier.score.weight.isfinite().all()
    assert classifier.score.weight.any()

    state = model.backbone.state_dict()
    dropped = [name for name in state if name.endswith(("D", "gamma_log", "Lambda_re"))]
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    partial = family.model_class.from_pretrained(None, config=model.config, state_dict=kept)
    loaded = partial.state_dict()
    assert_close({name: loaded[name] for name in kept}, kept, rtol=0, atol=0)
    assert all(loaded[name].isfinite().all() and not torch.equal(loaded[name], state[name]) for name in dropped)


@families
def test_models_are_built_without_memory_on_the_meta_device(family):
    with torch.device("meta"):
        model = family.causal_class(family.config(vocab_size=VOCAB_SIZE))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One folder with three models, and beside each what it computes here."""
    folder = tmp_path_factory.mktemp("exported")
    two_way = S5.classifier_class(S5.config(vocab_size=VOCAB_SIZE, bidirectional=True, **PER_LAYER))
    models = {
        "s5": S5.causal_model(**PER_LAYER),
        "lru": LRU.causal_model(**PER_LAYER),
        "two-way": perturbed(two_way).eval(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        x = tokens(2, 6)
        saved = {"x": x, "logits": model(x).logits.detach()}
        if name != "two-way":
            saved["generated"] = model.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
        torch.save(saved, folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("mode", [pytest.param("with package", marks=pytest.mark.slow), "without package"])
def test_a_saved_folder_loads_in_another_process(exported, mode, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    if mode == "without package":
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
    assert process.stdout.strip().endswith("loaded")


def test_the_exported_config_names_every_class_and_its_file_is_there(exported):
    for name in ("s5", "lru"):
        auto_map = json.loads((exported / name / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {
            "AutoConfig",
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForSequenceClassification",
        }
        assert all((exported / name / f"{target.split('.')[0]}.py").exists() for target in auto_map.values())
        assert type(AutoConfig.from_pretrained(exported / name)).__module__.startswith("hf_compressm")
