"""Runs that are resumed around a cut end bit for bit where the uninterrupted run ends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, find_last_complete_checkpoint
from hf_compressm.training.loading import CheckpointLoader
from tests.family_table import JAMBA, LRU, MAMBA, MAMBA2, S5, Family, by_layout, family_id, outputs, same
from tests.trainers import HALVE, Examples, arguments, callback_of, keeping_best, trainer_of


CUT = 2  # HALVE cuts after this step
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "frozen": {},
    "shards": {},
    "epochs": {"save_strategy": "epoch", "per_device_train_batch_size": 12, "max_steps": 6},
    "bf16": {"bf16": True},
    "limit": {"save_total_limit": 3},
}


def model_of(family: Family, setting: str) -> Any:
    """A model of the original size, as user scripts build it."""
    model = family.build()
    if setting == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" not in name)
    return model


def run(family: Family, folder: Path, setting: str, resume: Path | None = None, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = trainer_of(family, folder, model=model_of(family, setting), **{**SAVING, **SETTINGS[setting], **kwargs})
    if setting == "shards":
        save = trainer.model.save_pretrained
        trainer.model.save_pretrained = lambda *args, **own: save(*args, **{**own, "max_shard_size": "1KB"})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that a run ends with, but for times."""
    timed = ("runtime", "per_second", "seconds", "train_loss")
    history = [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in trainer.state.log_history
    ]
    optimizer = trainer.optimizer.state_dict()
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "moments": optimizer["state"],
        "log": history,
        "config": trainer.model.config.to_dict(),
        "class": type(trainer.model).__name__,
        "events": [(event.step, event.outcome, event.sizes) for event in callback_of(trainer).events],
    }


@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("plain", "accumulation"))) for name in SETTINGS],
)
@pytest.mark.parametrize("family", [LRU, pytest.param(MAMBA, marks=pytest.mark.slow)], ids=family_id)
def test_a_resumed_run_ends_where_the_whole_run_ends(family: Family, setting: str, tmp_path: Path) -> None:
    whole = outcome(run(family, tmp_path, setting))
    assert [event[:2] for event in whole["events"]] == [(CUT, "cut")]
    saved = sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    for step in saved[:-1]:  # before, at and after the cut
        copy = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / f"checkpoint-{step}", copy / f"checkpoint-{step}")
        resumed = outcome(run(family, copy, setting, copy / f"checkpoint-{step}"))
        for part, value in whole.items():
            assert same(resumed[part], value), (step, part)


@pytest.mark.parametrize("family", by_layout(), ids=family_id)
def test_every_family_resumes_after_its_cut_into_a_model_of_the_original_size(family: Family, tmp_path: Path) -> None:
    whole = outcome(run(family, tmp_path, "plain", max_steps=4))
    resumed = outcome(run(family, tmp_path, "plain", tmp_path / "checkpoint-3", max_steps=4))
    assert all(same(resumed[part], value) for part, value in whole.items())


@pytest.mark.parametrize(
    ("family", "best", "size", "shards"),
    [
        (LRU, 2, 8, None),
        pytest.param(LRU, 3, 4, None, marks=pytest.mark.slow),
        pytest.param(MAMBA, 1, 8, "2KB", marks=pytest.mark.slow),
        (MAMBA, 4, 4, "2KB"),
        pytest.param(JAMBA, 2, 8, None, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else str(value),
)
def test_the_best_model_is_loaded_from_before_a_cut_and_from_after_it(
    family: Family, best: int, size: int, shards: str | None, tmp_path: Path
) -> None:
    model = family.build()
    if shards:
        save = model.save_pretrained
        model.save_pretrained = lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": shards})
    trainer = trainer_of(
        family,
        tmp_path,
        model=model,
        **SAVING,
        **keeping_best(family, best),
    )
    trainer.train()
    folder = tmp_path / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(folder)
    loaded = type(model).from_pretrained(folder)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(outputs(loaded, family.batch()), outputs(model.eval(), family.batch()))
    assert getattr(model.config, family.size_field) == size
    on_disk, in_memory = loaded.config.to_dict(), model.config.to_dict()
    assert {**on_disk, "_name_or_path": ""} == in_memory
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    trainer.args.load_best_model_at_end = False
    trainer.train()  # goes on with the model and optimizer as they are now


def test_the_best_model_is_of_the_stock_class_again_if_it_was_before_the_first_cut(tmp_path: Path) -> None:
    trainer = trainer_of(
        MAMBA2,
        tmp_path,
        {**HALVE, "compat": "best"},
        **SAVING,
        **keeping_best(MAMBA2, 2),
    )
    before = [name for name, _ in trainer.model.named_parameters()]
    trainer.train()
    assert type(trainer.model) is MAMBA2.model_class
    assert [name for name, _ in trainer.model.named_parameters()] == before
    assert callback_of(trainer).events[0].outcome == "cut"


def test_a_run_that_changed_its_class_resumes_into_a_stock_model(tmp_path: Path) -> None:
    settings = {**HALVE, "compat": "best"}
    whole = trainer_of(MAMBA2, tmp_path, settings, **SAVING)
    whole.train()
    for step in (1, 2, 3):
        trainer = trainer_of(MAMBA2, tmp_path, settings, **SAVING)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert type(trainer.model) is type(whole.model)
        assert same(dict(trainer.model.state_dict()), dict(whole.model.state_dict()))
        assert same(trainer.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])


def test_a_later_checkpoint_is_loaded_to_resume_from_an_earlier_one(tmp_path: Path) -> None:
    whole = outcome(run(LRU, tmp_path, "plain"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    trainer = trainer_of(LRU, tmp_path, model=small, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(outcome(trainer)["weights"], whole["weights"])


@pytest.mark.parametrize("restore", [False, True])
def test_a_changed_schedule_wins_over_that_of_the_checkpoint_unless_callbacks_are_restored(
    restore: bool, tmp_path: Path
) -> None:
    run(LRU, tmp_path, "plain")
    trainer = trainer_of(LRU, tmp_path, {**HALVE, "end": 4}, **SAVING, restore_callback_states_from_checkpoint=restore)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [event.step for event in callback_of(trainer).events] == [CUT if restore else 4]


def test_a_cut_that_a_checkpoint_already_holds_is_not_made_again(tmp_path: Path) -> None:
    run(LRU, tmp_path, "plain")
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    saved["global_step"] = CUT  # as transformers' just-in-time checkpoint has it, if it comes after the cut
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(saved))
    (tmp_path / "checkpoint-3" / "compressm.complete").unlink()
    trainer = trainer_of(LRU, tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.model.config.state_size == 4


def test_a_run_goes_on_without_the_callback_from_its_checkpoint(tmp_path: Path) -> None:
    run(LRU, tmp_path, "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    trainer = trainer_of(LRU, tmp_path, None, model=model, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 5
    assert trainer.model.config.state_size == 4


def test_the_last_checkpoint_is_refused_if_it_is_torn_and_the_last_whole_one_is_named(tmp_path: Path) -> None:
    run(LRU, tmp_path, "plain")
    weights = tmp_path / "checkpoint-5" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    trainer = trainer_of(LRU, tmp_path, **{**SAVING, "max_steps": 8})
    with pytest.raises(ValueError, match=r"model.safetensors.*damaged.*checkpoint-4"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_family_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    run(S5, tmp_path, "plain")
    trainer = trainer_of(LRU, tmp_path, **SAVING)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'s5' model.*LRUForCausalLM"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(dict(trainer.model.state_dict()), before)


@pytest.mark.parametrize("damage", ["missing", "another size", "another number of parameters"])
def test_optimizer_state_that_does_not_fit_is_refused_or_reset_if_that_is_allowed(damage: str, tmp_path: Path) -> None:
    run(LRU, tmp_path, "plain")
    folder = tmp_path / "checkpoint-3"
    path = folder / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    if damage == "another size":
        state["state"][2]["exp_avg"] = torch.zeros(3, 3)
    elif damage == "another number of parameters":
        state["param_groups"][0]["params"].append(99)
    path.unlink()
    if damage != "missing":
        torch.save(state, path)
    (folder / "compressm.complete").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt.*allow_optimizer_reset=True"):
        trainer_of(LRU, tmp_path, **SAVING).train(resume_from_checkpoint=str(folder))
    trainer = trainer_of(LRU, tmp_path, {**HALVE, "allow_optimizer_reset": True}, **SAVING)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 5
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True)  # the scheduler went on


def test_an_optimizer_of_the_users_own_follows_a_resumed_model(tmp_path: Path) -> None:
    ends = []
    for checkpoint in (None, "checkpoint-3"):
        model = LRU.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # made for the original size
        trainer = trainer_of(LRU, tmp_path, model=model, optimizers=(optimizer, None), **SAVING)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}
        ends.append(dict(model.state_dict()))
    assert same(*ends)


def test_a_trainer_without_the_methods_that_load_is_refused_by_name(tmp_path: Path) -> None:
    class Renamed(Trainer):
        _load_best_model = None

    with pytest.raises(ValueError, match="_load_best_model"):
        CheckpointLoader(Renamed(model=LRU.build(), args=trainer_of(LRU, tmp_path).args), False, print)


def test_batches_that_do_not_fit_into_memory_start_over_with_smaller_ones(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, max_steps=6, auto_find_batch_size=True)
    step, failed = trainer.training_step, []

    def too_large(*args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == 4 and not failed:
            failed.append(trainer._train_batch_size)
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **kwargs)

    trainer.training_step = too_large
    trainer.train()
    assert trainer._train_batch_size < failed[0]
    assert trainer.state.global_step == 6
    assert [event.step for event in callback_of(trainer).events] == [2]
    assert [cut["step"] for cut in trainer.model.config.compressm["cuts"]] == [2, 2]  # the model keeps its first cut


@pytest.mark.filterwarnings("ignore")  # optuna's own
def test_a_search_over_hyperparameters_starts_each_trial_with_a_fresh_model(tmp_path: Path) -> None:
    sizes: list[tuple[int, int]] = []

    class Sizes(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sizes.append((kwargs["model"].config.state_size, 0))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sizes[-1] = (sizes[-1][0], kwargs["model"].config.state_size)

    trainer = Trainer(
        model_init=lambda trial: LRU.build(),
        args=arguments(tmp_path, **SAVING, eval_strategy="steps", eval_steps=5),
        train_dataset=Examples(LRU),
        eval_dataset=Examples(LRU, 4),
        callbacks=[CompreSSMCallback({**HALVE, "save_around_cuts": True}), Sizes()],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        backend="optuna",
        n_trials=2,
        direction="minimize",
    )
    assert sizes == [(8, 4), (8, 4)]
    runs = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("run-"))
    assert len(runs) == 2
    assert all((tmp_path / name / "checkpoint-3" / "compressm.complete").exists() for name in runs)
