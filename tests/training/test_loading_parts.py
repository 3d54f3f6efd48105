"""Runs of modules of one's own and of composite models resume across a cut, and load their best model."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from hf_compressm import CompreSSMambaConfig, CompreSSMambaForCausalLM, CompreSSMConfig, compress
from hf_compressm.checkpoints import fit_to_checkpoint, read_saved
from hf_compressm.families import find_layers
from hf_compressm.utils.configurations import configurations
from tests.family_table import LRU, MAMBA, Family, by_layout, family_id, same
from tests.own_modules import (
    around_lru,
    around_mamba,
    fixed,
    given,
    llava,
    own_layers,
    own_mixers,
    pair,
    plain,
    stock_around,
    two_mambas,
)
from tests.trainers import HALVE, Examples, callback_of, keeping_best, trainer_of


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
CUT = 2  # HALVE cuts after this step
BUILDS = (around_mamba, around_lru, two_mambas, own_mixers, own_layers, llava, pair, plain, given, fixed)
every_model = pytest.mark.parametrize(
    "build",
    [
        build if build in (around_mamba, own_layers, llava) else pytest.param(build, marks=pytest.mark.slow)
        for build in BUILDS
    ],
    ids=lambda build: build.__name__,
)


def run(build: Any, folder: Path, resume: Path | None = None, settings: Any = HALVE, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = trainer_of(MAMBA, folder, settings, model=build(), **{**SAVING, **kwargs})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def sizes(model: Any) -> list[int]:
    return [layer.state_size for layer in find_layers(model)]


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What a run ends with."""
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "moments": trainer.optimizer.state_dict()["state"],
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rate": [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry],
        "configs": [config.to_dict() for config in configurations(trainer.model)],
        "attributes": [
            {name: value for name, value in vars(part).items() if type(value) is int}
            for part in trainer.model.modules()
        ],
        "events": [(event.step, event.outcome, event.sizes) for event in callback_of(trainer).events],
    }


@every_model
def test_a_run_resumes_before_at_and_after_its_cut(build: Any, tmp_path: Path) -> None:
    settings = {**HALVE, "rewarmup_steps": 3}
    whole = outcome(run(build, tmp_path, settings=settings))
    assert [event[:2] for event in whole["events"]] == [(CUT, "cut")]
    for step in (CUT, CUT + 1):
        folder = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = outcome(run(build, folder, folder / f"checkpoint-{step}", settings))
        for part, value in whole.items():
            assert same(resumed[part], value), (step, part)


@every_model
@pytest.mark.parametrize("best", [CUT, pytest.param(CUT + 2, marks=pytest.mark.slow)])
def test_the_best_model_is_loaded_from_either_side_of_a_cut(build: Any, best: int, tmp_path: Path) -> None:
    before = build()
    trainer = run(build, tmp_path, **keeping_best(MAMBA, best))
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    now = sizes(trainer.model)
    assert now == sizes(before) if best <= CUT else now == [size // 2 for size in sizes(before)]
    for layer in find_layers(trainer.model):
        if layer.owner is not None:
            values = [vars(config).get(layer.family.size_field) for config in layer.owner.configs]
            assert set(values) == {layer.state_size}
            assert all(hasattr(config, "compressm") == (best > CUT) for config in layer.owner.configs)
    best_model = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    if build is llava:  # whose tensors have other names on the disk
        best_model = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{best}").state_dict()
    assert same(dict(trainer.model.state_dict()), dict(best_model))
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters()}
    trainer.args.load_best_model_at_end = False
    trainer.train()  # goes on with model and optimizer as they are now


def test_a_cut_of_a_module_of_ones_own_is_rolled_back(tmp_path: Path) -> None:
    made: list[Trainer] = []
    trainer = trainer_of(
        MAMBA,
        tmp_path,
        {**HALVE, "recovery_steps": 1, "metric_tolerance": 0.0},
        model=around_mamba(),
        eval_strategy="steps",
        eval_steps=100,
        eval_dataset=Examples(MAMBA, 4),
        compute_metrics=lambda _: {"score": float(made[0].state.global_step <= CUT)},
        metric_for_best_model="score",
        **SAVING,
    )
    made.append(trainer)
    trainer.train()
    assert [event.outcome for event in callback_of(trainer).events] == ["cut", "rolled back"]
    assert sizes(trainer.model) == [8, 8]
    assert trainer.model.bb.config.state_size == 8
    assert not hasattr(trainer.model.bb.config, "compressm")


@pytest.mark.parametrize(
    "build",
    [llava, pytest.param(plain, marks=pytest.mark.slow), pytest.param(given, marks=pytest.mark.slow)],
    ids=lambda build: build.__name__,
)
def test_lora_inside_such_a_model_resumes_and_goes_back(build: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def wrapped() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            settings = {"r": 2, "target_modules": ["in_proj", "x_proj"], "init_lora_weights": False}
            return peft.get_peft_model(build(), peft.LoraConfig(**settings))

    whole = run(wrapped, tmp_path)
    assert sizes(whole.model) == [4, 4]
    resumed = run(wrapped, tmp_path / "resumed", tmp_path / "checkpoint-3")
    assert same(outcome(resumed)["weights"], outcome(whole)["weights"])
    assert sizes(run(wrapped, tmp_path / "best", **keeping_best(MAMBA, CUT)).model) == [8, 8]


def test_an_earlier_record_of_a_part_comes_back_with_it(tmp_path: Path) -> None:
    def build() -> Any:
        model = around_mamba()
        compress(model, CompreSSMConfig(target_state_size=6), MAMBA.calibration())
        return model

    whole = run(build, tmp_path)
    resumed = run(build, tmp_path / "resumed", tmp_path / "checkpoint-3")
    assert len(whole.model.bb.config.compressm["cuts"]) == 2
    assert resumed.model.bb.config.compressm == whole.model.bb.config.compressm
    best = run(build, tmp_path / "best", **keeping_best(MAMBA, CUT))
    assert [cut["step"] for cut in best.model.bb.config.compressm["cuts"]] == [None]


def test_a_teacher_from_the_same_configuration_is_untouched_by_a_resume(tmp_path: Path) -> None:
    run(lambda: MAMBA.build(), tmp_path)
    config = MAMBA.config()
    student, teacher = MAMBA.model_class(config), MAMBA.model_class(config)
    fit_to_checkpoint(student, read_saved(tmp_path / "checkpoint-4"))
    assert (student.config.state_size, teacher.config.state_size) == (4, 8)
    assert teacher.config is config
    own = adopted_config(config)
    student, teacher = CompreSSMambaForCausalLM(own), CompreSSMambaForCausalLM(own)
    fit_to_checkpoint(student, read_saved(tmp_path / "checkpoint-4"))  # which is of the stock class
    assert (type(student), type(student.config)) == (MAMBA.model_class, MAMBA.config_class)
    assert (teacher.config is own, type(own), own.state_size) == (True, CompreSSMambaConfig, 8)


def adopted_config(config: Any) -> CompreSSMambaConfig:
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    return CompreSSMambaConfig(**values)


@pytest.mark.parametrize("family", by_layout(), ids=family_id)
def test_layers_of_every_family_take_sizes_by_shape(family: Family, tmp_path: Path) -> None:
    """Down to those of a cut model and up again: every shape, attribute and buffer is that of a model of that size."""
    small, large = stock_around(family, state_size=4), stock_around(family)
    for name, goal in (("small", small), ("large", large)):
        (tmp_path / name).mkdir()
        tensors = {key: value.clone() for key, value in goal.state_dict().items()}  # some are shared
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    model = stock_around(family)
    optimizer = torch.optim.AdamW(model.parameters())
    for name, goal in (("small", small), ("large", large)):
        assert fit_to_checkpoint(model, read_saved(tmp_path / name), optimizer)
        model.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
        for part, wanted in zip(model.modules(), goal.modules(), strict=True):
            assert {k: v for k, v in vars(part).items() if type(v) is int} == {
                k: v for k, v in vars(wanted).items() if type(v) is int
            }
            assert same(dict(part.named_buffers()), dict(wanted.named_buffers()))
        assert getattr(model.bb.config, family.size_field) == getattr(goal.bb.config, family.size_field)
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        if family.is_language_model:
            torch.testing.assert_close(model(**family.batch())["logits"], goal(**family.batch())["logits"])
        assert not fit_to_checkpoint(model, read_saved(tmp_path / name), optimizer)


def edited(folder: Path, change: Any) -> Path:
    model = around_mamba()
    tensors = model.state_dict()
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def widened(tensors: dict[str, torch.Tensor], name: str = "bb.layers.1.mixer.A_log", dim: int = 0) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widened, r"A_log of bb\.layers\.1\.mixer has the shape \(12, 8\) here and \(24, 8\)"),
        (lambda tensors: widened(tensors, dim=1), r"A_log of bb\.layers\.1\.mixer has the shape.*no number of states"),
        (lambda tensors: tensors.__delitem__("bb.layers.0.mixer.D"), r"no tensor for D of bb\.layers\.0\.mixer"),
        (lambda tensors: tensors.__delitem__("bb.layers.0.mixer.A_log"), r"no tensor for A_log of bb\.layers\.0"),
    ],
)
def test_shapes_of_no_state_size_are_refused_and_the_model_stays(change: Any, message: str, tmp_path: Path) -> None:
    model = around_mamba()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=message) as caught:
        fit_to_checkpoint(model, read_saved(edited(tmp_path, change)))
    assert str(tmp_path) in str(caught.value)
    assert same(dict(model.state_dict()), dict(before))
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


class Stop(TrainerCallback):
    """Fails if a step is made."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a step was made")


def test_a_family_that_cannot_tell_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(find_layers(own_layers())[0].family), "at_size", lambda *_: None)
    with pytest.raises(ValueError, match=r"configuration.*layers\.0.*'lru'.*at_size.*load_best_model_at_end"):
        run(own_layers, tmp_path, callbacks=[Stop()], **keeping_best(MAMBA, CUT))
    guarded = {**HALVE, "recovery_steps": 1, "metric_tolerance": 0.0}
    with pytest.raises(ValueError, match=r"'lru'.*at_size.*recovery_steps"):
        run(own_layers, tmp_path, settings=guarded, callbacks=[Stop()])
    run(own_layers, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4.*'lru' does not define at_size"):
        run(own_layers, tmp_path, tmp_path / "checkpoint-4", callbacks=[Stop()])
    run(around_lru, tmp_path / "unused", save_strategy="no")
    assert run(lambda: LRU.build(), tmp_path / "plain", **keeping_best(MAMBA, CUT)).model.config.state_size == 8
