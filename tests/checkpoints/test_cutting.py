"""A checkpoint that is cut on disk goes on as a run that was cut in place at the same step."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_compressm import (
    CompreSSMConfig,
    compress_checkpoint,
    find_last_complete_checkpoint,
    verify_checkpoint,
)
from hf_compressm.checkpoints import read_saved
from tests.family_table import JAMBA, LRU, MAMBA, MAMBA2, S5, S5_CLASSIFIER, Family, family_id, same
from tests.trainers import HALVE, callback_of, trainer_of


CUT = 3
SETTINGS = {"fraction": 0.5, "end": CUT, "num_cuts": 1}
PER_LAYER = {"tolerance": 0.05, "per_layer": True, "compat": "best", "min_reduction": 0, "end": CUT, "num_cuts": 1}
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "lr_scheduler_type": "cosine"}
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor"},
}
WRITTEN_BY_SAVING = ("_name_or_path", "architectures", "auto_map")


class Began(TrainerCallback):
    """Keeps weights and moments as a run goes on from them, after a cut at the start of its next step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer, self.seen = kwargs["optimizer"], {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == CUT:
            moments, config = kwargs["optimizer"].state_dict()["state"], kwargs["model"].config.to_dict()
            self.seen = {
                "weights": {name: value.clone() for name, value in kwargs["model"].state_dict().items()},
                "moments": {number: _copied(state) for number, state in moments.items()},
                "config": {key: value for key, value in config.items() if key not in WRITTEN_BY_SAVING},
            }


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def train(
    family: Family, folder: Path, settings: Any, model: Any = None, resume: Path | None = None, **kwargs: Any
) -> Trainer:
    torch.manual_seed(0)
    more = {"callbacks": [Began()], "calibration": family.calibration()}
    trainer = trainer_of(family, folder, settings, model, **{**SAVING, **more, **kwargs})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def began(trainer: Trainer) -> dict[str, Any]:
    return next(x for x in trainer.callback_handler.callbacks if isinstance(x, Began)).seen


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > CUT]


def cut_on_disk(family: Family, folder: Path, settings: Any = SETTINGS, **kwargs: Any) -> tuple[Path, Trainer]:
    """A run without the callback, and its checkpoint of step CUT cut."""
    trainer = train(family, folder / "plain", None, **kwargs)
    config = CompreSSMConfig.from_dict(settings)
    output = folder / "cut" / f"checkpoint-{CUT}"
    result = compress_checkpoint(folder / "plain" / f"checkpoint-{CUT}", output, config, family.calibration())
    assert result.changed
    verify_checkpoint(output)
    return output, trainer


def compare(resumed: Trainer, whole: Trainer) -> None:
    for part, value in began(whole).items():
        assert part == "config" or len(value)
        assert same(began(resumed)[part], value), part
    assert losses(resumed)[0] == pytest.approx(losses(whole)[0], abs=1e-5)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [
        (S5, "adamw"),
        (LRU, "sgd"),
        (MAMBA, "adafactor"),
        *(
            pytest.param(family, optimizer, marks=pytest.mark.slow)
            for family, optimizer in [
                (S5, "sgd"),
                (S5, "adafactor"),
                (LRU, "adamw"),
                (LRU, "adafactor"),
                (MAMBA, "adamw"),
                (MAMBA, "sgd"),
            ]
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else value,
)
def test_the_next_launch_goes_on_as_if_cut_in_place(family: Family, optimizer: str, tmp_path: Path) -> None:
    whole = train(family, tmp_path / "whole", SETTINGS, **OPTIMIZERS[optimizer])
    assert [event.outcome for event in callback_of(whole).events] == ["cut"]
    output, _ = cut_on_disk(family, tmp_path, **OPTIMIZERS[optimizer])
    resumed = train(family, tmp_path / "cut", None, read_saved(output).load(), output, **OPTIMIZERS[optimizer])
    compare(resumed, whole)


@pytest.mark.parametrize("family", [LRU, MAMBA], ids=family_id)
def test_the_callback_accepts_it_and_does_not_cut_again(family: Family, tmp_path: Path) -> None:
    whole = train(family, tmp_path / "whole", {**SETTINGS, "rewarmup_steps": 2})
    output, _ = cut_on_disk(family, tmp_path)
    assert find_last_complete_checkpoint(output.parent) == str(output)
    resumed = train(family, tmp_path / "cut", {**SETTINGS, "rewarmup_steps": 2}, resume=output)
    assert [(event.step, event.outcome) for event in callback_of(resumed).events] == [(CUT, "cut")]
    compare(resumed, whole)


@pytest.mark.parametrize(
    ("family", "settings"),
    [(S5_CLASSIFIER, SETTINGS), (MAMBA2, {**PER_LAYER, "tolerance": 0.2}), (MAMBA, PER_LAYER), (JAMBA, SETTINGS)],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)
@pytest.mark.slow
def test_classifiers_own_classes_and_mixtures(family: Family, settings: dict, tmp_path: Path) -> None:
    whole = train(family, tmp_path / "whole", settings)
    output, _ = cut_on_disk(family, tmp_path, settings)
    resumed = train(family, tmp_path / "cut", None, read_saved(output).load(), output)
    assert type(resumed.model) is type(whole.model)
    compare(resumed, whole)


def test_a_history_is_extended(tmp_path: Path) -> None:
    train(LRU, tmp_path, {**HALVE, "end": 2})
    output = tmp_path / "out"
    result = compress_checkpoint(tmp_path / "checkpoint-4", output, CompreSSMConfig(target_state_size=2))
    history = json.loads((output / "compressm_history.json").read_text())
    assert [event["step"] for event in history["events"]] == [2, 4]
    resumed = train(LRU, tmp_path / "on", {**HALVE, "end": 2}, resume=output)
    assert [event.step for event in callback_of(resumed).events] == [2, 4]
    assert set(result.state_sizes_after.values()) == {2}
    assert resumed.model.config.state_size == 2
    for name in ("scheduler.pt", "rng_state.pth", "training_args.bin"):
        assert (output / name).read_bytes() == (tmp_path / "checkpoint-4" / name).read_bytes()


def test_shards_and_dtypes_stay(tmp_path: Path) -> None:
    model = LRU.build().to(torch.bfloat16)
    model.lm_head.float()
    model.save_pretrained(tmp_path / "saved", max_shard_size=200)
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    compress_checkpoint(tmp_path / "saved", tmp_path / "a" / "b", CompreSSMConfig(fraction=0.5))
    assert len(list((tmp_path / "a" / "b").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "a" / "b" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "a" / "b" / "trainer_state.json").exists()
    cut = read_saved(tmp_path / "a" / "b").load()
    assert {name: value.dtype for name, value in cut.state_dict().items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }
    assert cut.config.state_size == 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with optimizer state."""
    folder = tmp_path_factory.mktemp("made")
    train(LRU, folder, None, max_steps=1)
    return folder / "checkpoint-1"


def deepspeed(folder: Path) -> None:
    (folder / "global_step1").mkdir()


def deepspeed_script(folder: Path) -> None:
    (folder / "zero_to_fp32.py").touch()


def adapters(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def pickled(folder: Path) -> None:
    torch.save(nn.Linear(2, 2), folder / "optimizer.pt")


def no_step(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"global_step": "1"}')


def pending(folder: Path) -> None:
    history = {"schema_version": 1, "events": [], "recovery": {"pending": {"step": 1}}}
    (folder / "compressm_history.json").write_text(json.dumps(history))


def pending_in_the_place_of_earlier_versions(folder: Path) -> None:
    (folder / "compressm_history.json").unlink(missing_ok=True)
    state = json.loads((folder / "trainer_state.json").read_text())
    run = {"schema_version": 1, "events": [], "recovery": {"pending": {"step": 1}}}
    state["stateful_callbacks"]["CompreSSMCallback"] = {"args": {}, "attributes": {}, "run": run}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def no_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "norm" not in name}, folder / "model.safetensors")


def changed_groups(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def change_file(folder: Path) -> None:
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        change(saved)
        torch.save(saved, folder / "optimizer.pt")

    return change_file


frozen = changed_groups(lambda saved: saved["param_groups"][0]["params"].pop(0))
other_order = changed_groups(lambda saved: saved["param_groups"][0]["params"].reverse())
no_state = changed_groups(lambda saved: saved.pop("state"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (deepspeed, "DeepSpeed.*zero_to_fp32"),
        (deepspeed_script, "DeepSpeed"),
        (adapters, "PEFT.*[Mm]erge"),
        (torn, "not a whole safetensors file"),
        (pickled, "optimizer.pt cannot be carried.*cannot be read.*optimizer_state='reset'"),
        (no_step, "global_step"),
        (pending, "waited for its metric"),
        (pending_in_the_place_of_earlier_versions, "waited for its metric"),
        (no_norm, "no tensor .*norm"),
        (frozen, "optimizer_state='reset'"),
        (other_order, "moments are not those.*optimizer_state='reset'"),
        (no_state, "does not hold the state of a torch optimizer"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_leaves_nothing(
    spoil: Callable[[Path], None], message: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "made", ignore=shutil.ignore_patterns("compressm.complete"))
    spoil(tmp_path / "made")
    with pytest.raises(ValueError, match=message):
        compress_checkpoint(tmp_path / "made", tmp_path / "out", CompreSSMConfig(fraction=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("place", ["made", "made/inside", "full", "full/file"])
def test_outputs_that_are_in_the_way_are_refused(place: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="output"):
        compress_checkpoint(tmp_path / "made", tmp_path / place, CompreSSMConfig(fraction=0.5))
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("a full disk")

    monkeypatch.setattr("hf_compressm.checkpoints.cutting.seal_checkpoint", fail)
    with pytest.raises(OSError, match="a full disk"):
        compress_checkpoint(made, tmp_path / "new" / "out", CompreSSMConfig(fraction=0.5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", [frozen, other_order, pickled])
def test_a_reset_goes_on_with_fresh_moments(spoil: Callable[[Path], None], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    spoil(tmp_path / "made")
    (tmp_path / "made" / "compressm.complete").unlink(missing_ok=True)
    config = CompreSSMConfig(fraction=0.5, optimizer_state="reset")
    compress_checkpoint(tmp_path / "made", tmp_path / "checkpoint-1", config)
    if spoil is pickled:
        assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    else:
        saved = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
        assert saved["state"] == {}
        assert len(saved["param_groups"]) == 2
    settings = {**HALVE, "allow_optimizer_reset": True}
    resumed = train(LRU, tmp_path, settings, read_saved(tmp_path / "checkpoint-1").load(), tmp_path / "checkpoint-1")
    assert resumed.state.global_step == SAVING["max_steps"]


def test_one_group_of_all_parameters_and_named_ones_are_known(tmp_path: Path) -> None:
    for number, named in enumerate((False, True)):
        model = LRU.build()
        given = [model.named_parameters()] if named else [model.parameters()]
        optimizer = torch.optim.AdamW(*given, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        trainer = train(LRU, tmp_path / str(number), None, model, optimizers=(optimizer, scheduler))
        cut = compress_checkpoint(
            tmp_path / str(number) / "checkpoint-6", tmp_path / f"out{number}", CompreSSMConfig(fraction=0.5)
        )
        assert cut.changed
        saved = torch.load(tmp_path / f"out{number}" / "optimizer.pt", weights_only=True)
        shapes = [tuple(state["exp_avg"].shape) for _, state in sorted(saved["state"].items())]
        assert shapes == [tuple(p.shape) for p in read_saved(tmp_path / f"out{number}").load().parameters()]
        assert shapes != [tuple(p.shape) for p in trainer.model.parameters()]
