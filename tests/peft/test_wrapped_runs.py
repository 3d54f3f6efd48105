"""Models inside peft's `PeftModel`: adapters follow a cut exactly or are refused, and no base gets lost."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import CompreSSMConfig, analyze, compress, find_last_complete_checkpoint
from hf_compressm.peft.saved_base import keeps_base_beside, plain_state
from hf_compressm.surgery import Snapshot
from tests.family_table import (
    BAMBA,
    FALCON_H1,
    FALCON_MAMBA,
    GRANITE,
    JAMBA,
    MAMBA,
    MAMBA2,
    MAMBA2_PLAIN,
    NEMOTRON_H,
    S5,
    ZAMBA,
    ZAMBA2,
    Family,
    outputs,
    same,
    snapshot,
)
from tests.trainers import HALVE, Examples, keeping_best, trainer_of


HALF = CompreSSMConfig(fraction=0.5)
ROUND_OFF = 1e-4  # float32 logits of some units: W + s B A is summed in another order
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
FRESH_PROCESS = """
import json, sys, torch
sys.modules["hf_compressm"] = None
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    tokens, logits = torch.load(f"{folder}/expected.pt")
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base_model")
    size = base.config.state_size
    models = [PeftModel.from_pretrained(base, folder), AutoPeftModelForCausalLM.from_pretrained(folder)]
    gaps = [float((model.eval()(input_ids=tokens).logits - logits).abs().max()) for model in models]
    print(json.dumps([size, *gaps]))
"""


def randomised(model: Any, seed: int = 1) -> Any:
    """Adapters that do something: B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def wrapped(family: Family, *targets: str, model: Any = None, **settings: Any) -> Any:
    config = LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": list(targets), **settings})
    return randomised(get_peft_model(family.build() if model is None else model, config))


def cut(model: Any, family: Family, settings: CompreSSMConfig = HALF, **kwargs: Any) -> Any:
    result = compress(model, settings, family.calibration(), **kwargs)
    assert result.changed
    return result


def effective(module: Any, adapter: str) -> torch.Tensor:
    return module.base_layer.weight + module.get_delta_weight(adapter)


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        (MAMBA, ["x_proj", "in_proj"], {}),
        (MAMBA, ["x_proj"], {"use_rslora": True, "alpha_pattern": {"layers.1.mixer.x_proj": 11}}),
        (MAMBA, ["in_proj"], {}),
        (FALCON_MAMBA, ["x_proj"], {}),
        (JAMBA, ["x_proj", "out_proj"], {}),
        (ZAMBA, ["in_proj"], {}),
        (MAMBA2, ["in_proj"], {}),
        (MAMBA2, ["in_proj"], {"use_dora": True}),
        (MAMBA2_PLAIN, ["in_proj"], {}),
        (BAMBA, ["in_proj", "out_proj"], {}),
        (ZAMBA2, ["in_proj"], {}),
        (FALCON_H1, ["in_proj"], {}),
        (GRANITE, ["in_proj"], {}),
        (NEMOTRON_H, ["in_proj"], {}),
        (S5, ["gate"], {}),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "-".join(value),
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_merging_before_a_cut_and_after_it_gives_the_same_logits(
    family: Family, targets: list[str], settings: dict[str, Any]
) -> None:
    late, early = (wrapped(family, *targets, **settings) for _ in range(2))
    batch = family.batch()
    without = outputs(late.get_base_model(), batch)
    with late.disable_adapter():
        assert (outputs(late, batch) - without).abs().max() > 0.01  # the adapters do something
    unfitted = replace(HALF, refit_steps=0)  # a fit takes steps in proportion to base and merged weights
    result = cut(late, family, unfitted)
    assert list(result.state_sizes_after) == list(late.config.compressm["state_sizes_after"])
    assert not any(name.startswith("base_model") for name in result.state_sizes_after)
    before_merging = outputs(late, batch)
    merged = late.merge_and_unload()
    early = early.merge_and_unload()
    cut(early, family, unfitted)
    assert {name: tuple(value.shape) for name, value in merged.state_dict().items()} == {
        name: tuple(value.shape) for name, value in early.state_dict().items()
    }
    assert (outputs(merged, batch) - before_merging).abs().max() < ROUND_OFF
    assert (outputs(merged, batch) - outputs(early, batch)).abs().max() < ROUND_OFF
    assert getattr(merged.config, family.size_field) == getattr(early.config, family.size_field)


def test_the_loudness_of_a_channel_is_that_of_base_and_adapter_together() -> None:
    late, early = (wrapped(JAMBA, "out_proj") for _ in range(2))
    early = early.merge_and_unload()
    plans = [analyze(model, HALF, JAMBA.calibration()) for model in (late, early, wrapped(JAMBA, "x_proj"))]
    spectra = [torch.stack([layer.hankel_singular_values for layer in plan.layers]) for plan in plans]
    assert torch.allclose(spectra[0], spectra[1], rtol=1e-4)
    assert not torch.allclose(spectra[0], spectra[2], rtol=1e-2)


def test_every_adapter_follows_whether_it_is_active_or_not() -> None:
    model = wrapped(MAMBA2, "in_proj")
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=7, target_modules=["in_proj"]))
    randomised(model)
    layers = {name: module for name, module in model.named_modules() if name.endswith("in_proj")}
    before = {name: {a: effective(layer, a) for a in ("default", "other")} for name, layer in layers.items()}
    bases = {name: layer.base_layer.weight for name, layer in layers.items()}
    cut(model, MAMBA2)
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        kept = [int((bases[name] == row).all(dim=1).nonzero()) for row in weight]
        assert len(kept) < len(bases[name])
        widths = {layer.out_features, layer.base_layer.out_features, *(B.out_features for B in layer.lora_B.values())}
        assert widths == {len(kept)}
        for adapter, weights in before[name].items():
            assert torch.allclose(effective(layer, adapter), weights[kept], atol=1e-6)


def test_the_moments_of_B_follow_as_those_of_the_weight_do() -> None:
    """With A at rest, the gradient of B is `s G A^T`: a relation between the moments that a cut has to keep."""
    model = wrapped(MAMBA, "x_proj")
    layers = [module for name, module in model.named_modules() if name.endswith("x_proj")]
    trained = [p for layer in layers for p in (layer.base_layer.weight, layer.lora_B["default"].weight)]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    model(**MAMBA.batch()).loss.backward()
    optimizer.step()
    sizes = [layer.lora_B["default"].weight.shape[0] for layer in layers]
    cut(model, MAMBA, optimizer=optimizer)
    for layer, size in zip(layers, sizes, strict=True):
        B = layer.lora_B["default"].weight
        moment = optimizer.state[B]["momentum_buffer"]
        of_the_weight = optimizer.state[layer.base_layer.weight]["momentum_buffer"]
        wanted = layer.scaling["default"] * of_the_weight @ layer.lora_A["default"].weight.T
        assert moment.shape == B.shape
        assert moment.shape[0] < size
        assert moment.abs().max() > 0
        assert torch.allclose(moment, wanted, rtol=1e-4, atol=1e-7)


REFUSED: dict[str, tuple[Family, Any, str]] = {
    "dora": (MAMBA, LoraConfig(target_modules=["x_proj"], use_dora=True), "DoRA's magnitudes cannot follow"),
    "bias": (MAMBA, LoraConfig(target_modules=["x_proj"], lora_bias=True), "lora_bias"),
    "loha": (MAMBA2, LoHaConfig(target_modules=["in_proj"]), r"\(loha.Linear\).*only LoRA"),
    "ia3": (FALCON_MAMBA, IA3Config(target_modules=["x_proj"], feedforward_modules=[]), r"\(ia3.Linear\)"),
    "norm": (JAMBA, LNTuningConfig(target_modules=["b_layernorm"]), r"layers.0.mamba.b_layernorm.*only LoRA"),
    "copy": (MAMBA, LoraConfig(target_modules=["in_proj"], modules_to_save=["x_proj"]), "trained in its place"),
    "layer": (MAMBA, LoraConfig(target_modules=["lm_head"], modules_to_save=["mixer"]), "around a whole SSM layer"),
    "parameter": (ZAMBA, LoraConfig(target_modules=[], target_parameters=["mamba.x_proj_weight"]), "whole SSM layer"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:.*`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_what_would_not_follow_exactly_is_refused_before_anything_changes(case: str, tmp_path: Path) -> None:
    family, config, message = REFUSED[case]
    model = get_peft_model(family.build(), config)
    before = snapshot(model)
    for attempt in (
        lambda: analyze(model, HALF, family.calibration()),
        lambda: compress(model, HALF, family.calibration()),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            attempt()
        assert "merge_and_unload" in str(refusal.value)
        assert same(snapshot(model), before)
    with pytest.raises(ValueError, match=message):
        trainer_of(family, tmp_path, model=model, max_steps=3).train()
    assert same(snapshot(model)["tensors"], before["tensors"])


def test_a_merged_adapter_and_a_mixed_model_are_refused(tmp_path: Path) -> None:
    model = wrapped(MAMBA, "in_proj")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"in_proj has the adapter 'default' merged.*unmerge_adapter"):
        compress(model, HALF, MAMBA.calibration())
    mixed = get_peft_model(MAMBA.build(), LoraConfig(target_modules=["in_proj"]), mixed=True)
    with pytest.raises(ValueError, match=r"PeftMixedModel.*get_peft_model"):
        trainer_of(MAMBA, tmp_path, model=mixed).train()


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
def test_half_precision_stays_what_it_is(adapters: torch.dtype) -> None:
    model = get_peft_model(
        MAMBA.build(torch.bfloat16),
        LoraConfig(r=2, target_modules=["x_proj"]),
        autocast_adapter_dtype=adapters == torch.float32,
    )
    randomised(model)
    cut(model, MAMBA)
    dtypes = {("lora" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, adapters)}
    assert outputs(model, MAMBA.batch()).isfinite().all()


def test_a_cut_that_is_taken_back_leaves_nothing() -> None:
    model = wrapped(MAMBA, "x_proj")
    before, taken = snapshot(model), Snapshot(model)
    cut(model, MAMBA)
    assert keeps_base_beside(model)
    taken.restore()
    assert not keeps_base_beside(model)
    assert same(snapshot(model), before)


def test_the_best_cut_of_a_mamba2_goes_through_the_wrapper() -> None:
    """Any adapter may be around `in_proj`, which the projection leaves as it is."""
    model = get_peft_model(MAMBA2.build(), LoHaConfig(target_modules=["in_proj"]))
    cut(model, MAMBA2, CompreSSMConfig(target_state_size=3, compat="best"))
    assert type(model.get_base_model()).__name__ == "CompreSSMamba2ForCausalLM"
    held = dict(model.named_parameters())
    assert not any(parameter.requires_grad for name, parameter in held.items() if "B_proj" in name)
    assert outputs(model, MAMBA2.batch()).isfinite().all()


def run(folder: Path, *targets: str, family: Family = MAMBA, resume: Path | None = None, **kwargs: Any) -> Trainer:
    settings = kwargs.pop("settings", HALVE)
    torch.manual_seed(0)
    model = kwargs.pop("model", None) or wrapped(family, *targets)
    trainer = trainer_of(family, folder, settings, model=model, **{**SAVING, **kwargs})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def widths(model: Any) -> dict[str, int]:
    return {name: part.out_features for name, part in model.named_modules() if hasattr(part, "out_features")}


@pytest.mark.slow
def test_adapter_and_base_load_together_in_a_fresh_process(tmp_path: Path) -> None:
    """Without this package; where no adapter is around `x_proj` the original base would be taken without a word."""
    folders = []
    for targets in (["x_proj", "in_proj"], ["in_proj"]):
        folder = tmp_path / "-".join(targets)
        trainer = run(folder / "run", *targets, save_strategy="no")
        trainer.save_model(str(folder))
        tokens = MAMBA.batch()["input_ids"]
        torch.save((tokens, outputs(trainer.model.eval(), {"input_ids": tokens})), folder / "expected.pt")
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            folder / "base_model"
        )
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, *folders], capture_output=True, text=True, check=True)
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(seen) == 2
    for size, *gaps in seen:
        assert size == 4
        assert max(gaps) < ROUND_OFF
    stale = PeftModel.from_pretrained(MAMBA.build(), folders[1]).eval()
    tokens, logits = torch.load(f"{folders[1]}/expected.pt")
    assert (outputs(stale, {"input_ids": tokens}) - logits).abs().max() > 100 * ROUND_OFF


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        (MAMBA, ["x_proj", "in_proj"], HALVE),
        pytest.param(MAMBA, ["in_proj"], HALVE, marks=pytest.mark.slow),
        pytest.param(MAMBA2_PLAIN, ["in_proj"], HALVE, marks=pytest.mark.slow),
        (MAMBA2, ["in_proj"], {**HALVE, "compat": "best"}),
        pytest.param(JAMBA, ["x_proj", "out_proj"], HALVE, marks=pytest.mark.slow),
        pytest.param(NEMOTRON_H, ["in_proj"], HALVE, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "-".join(value),
)
def test_a_run_resumes_bit_for_bit_into_a_base_of_the_original_size(
    family: Family, targets: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(tmp_path, *targets, family=family, settings=settings)
    weights = [next((tmp_path / f"checkpoint-{step}/base_model").glob("*.safetensors")) for step in range(1, 6)]
    assert len({path.stat().st_ino for path in weights}) == 2  # one before the cut, one after it
    for step in (1, 2, 3):
        resumed = run(
            tmp_path / "again", *targets, family=family, settings=settings, resume=tmp_path / f"checkpoint-{step}"
        )
        assert type(resumed.model.get_base_model()) is type(whole.model.get_base_model())
        assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict())), step
        assert same(resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]), step
        assert resumed.model.config.to_dict() == whole.model.config.to_dict()
        assert widths(resumed.model) == widths(whole.model)


@pytest.mark.parametrize(("best", "size"), [(2, 8), (4, 4)])
def test_the_best_model_is_loaded_with_the_base_that_it_had(best: int, size: int, tmp_path: Path) -> None:
    model = wrapped(MAMBA, "in_proj")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["x_proj"]))
    randomised(model)
    trainer = run(
        tmp_path,
        model=model,
        **keeping_best(MAMBA, best),
    )
    folder = tmp_path / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(folder)
    assert trainer.model.config.state_size == size
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base_model"), folder)
    loaded.load_adapter(folder / "other", "other")
    assert same(dict(loaded.state_dict()), dict(trainer.model.state_dict()))


def test_a_cut_that_was_not_recovered_from_is_rolled_back_with_its_adapters(tmp_path: Path) -> None:
    losses = iter([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])  # the first to find out that there is such a metric
    trainer = run(
        tmp_path,
        "x_proj",
        settings={**HALVE, "recovery_steps": 1, "metric_tolerance": 0.0},
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=Examples(MAMBA, 4),
        compute_metrics=lambda prediction: {"gap": next(losses)},
        metric_for_best_model="gap",
        greater_is_better=False,
    )
    assert trainer.model.config.state_size == 8
    assert not getattr(trainer.model.config, "compressm", None)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad} == held


def test_checkpoints_with_named_adapters_and_bases_are_told_from_torn_ones(tmp_path: Path) -> None:
    model = get_peft_model(MAMBA.build(), LoraConfig(r=2, target_modules=["x_proj"]), adapter_name="mine")
    run(tmp_path, model=randomised(model), max_steps=4)
    assert (tmp_path / "checkpoint-4/mine/adapter_model.safetensors").is_file()
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4/compressm.complete").unlink()
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4/base_model/model.safetensors").unlink()
    (tmp_path / "checkpoint-3/mine/adapter_model.safetensors").unlink()
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_adapters_without_the_base_that_a_cut_took_are_refused(tmp_path: Path) -> None:
    trainer = run(tmp_path / "plain", "in_proj", settings=None, max_steps=2)
    again = trainer_of(MAMBA, tmp_path, model=trainer.model, **SAVING)
    cut(trainer.model, MAMBA)
    with pytest.raises(ValueError, match="no base_model, and the model was cut since"):
        again.train(resume_from_checkpoint=str(tmp_path / "plain/checkpoint-2"))


def test_a_base_that_the_user_names_is_named_and_an_initialisation_does_not_change_it_again(tmp_path: Path) -> None:
    model = get_peft_model(MAMBA.build(), LoraConfig(r=2, target_modules=["x_proj"], init_lora_weights="pissa"))
    cut(model.eval(), MAMBA)
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")  # the way of saving is the copy's own
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].init_lora_weights == "pissa"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base_model"), tmp_path)
    batch = MAMBA.batch()
    assert (outputs(loaded.eval(), batch) - outputs(model, batch)).abs().max() < ROUND_OFF
    assert same(plain_state(loaded), plain_state(model))
    model.peft_config["default"].base_model_name_or_path = "me/mamba-smaller"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "me/mamba-smaller"


def test_a_trained_copy_of_the_head_is_no_part_of_the_base(tmp_path: Path) -> None:
    model = wrapped(MAMBA2_PLAIN, "in_proj", modules_to_save=["norm_f"])
    original = {name: value.clone() for name, value in plain_state(model).items() if "norm_f" in name}
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.constant_(parameter, 3.0)
    cut(model, MAMBA2_PLAIN)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base_model")
    assert torch.equal(base.state_dict()["backbone.norm_f.weight"], original["backbone.norm_f.weight"])
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = MAMBA2_PLAIN.batch()
    assert (outputs(loaded, batch) - outputs(model, batch)).abs().max() < ROUND_OFF
