"""A run measures on the batches of its own last steps, whatever Trainer, loader and collator they come from."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from transformers import DataCollatorForLanguageModeling, Trainer

from hf_compressm import CompreSSMCallback
from hf_compressm.files.batches import UnsavableBatchError, read_batches, write_batches
from tests.family_table import LRU, MAMBA, Family, same
from tests.trainers import HALVE, Examples, callback_of, trainer_of
from tests.training.test_clients import tiny_tokenizer


SAVING = {"save_strategy": "steps", "save_steps": 1}


class Seeing(Trainer):
    """Notes the batches of its training steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[int]] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(inputs["input_ids"].flatten().tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


class Weighted(Trainer):
    """Weighs its batches, by an entry that no model takes."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        weight, labels = inputs.pop("weight"), inputs.pop("labels")
        self.weights = [*getattr(self, "weights", []), *weight.tolist()]
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss * weight.mean(), outputs) if return_outputs else loss * weight.mean()


class Nested(Trainer):
    """Takes a tuple inside of a dict."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, dict(inputs["pair"][1]), return_outputs, **kwargs)


class Loading(Trainer):
    """Loads in a way of its own."""

    make_loader: Any = None

    def get_train_dataloader(self) -> Any:
        return self.make_loader(self.train_dataset)


class OneStream(IterableDataset):
    """A view of one stream that all of its iterations share."""

    def __init__(self, family: Family) -> None:
        self.source = iter(Examples(family, 64).rows)

    def __iter__(self) -> Iterator[dict]:
        yield from self.source


class OpenedByWorkers(Dataset):
    """Has its file only in the processes that load."""

    rows: Any = None

    def __init__(self, family: Family) -> None:
        self.family = family

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def open_in_worker(number: int) -> None:
    dataset = get_worker_info().dataset
    dataset.rows = Examples(dataset.family).rows


class BareLoader:
    """Batches without a dataset behind them."""

    def __init__(self, dataset: Any) -> None:
        self.batches = list(DataLoader(dataset, batch_size=2))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Paired(Dataset):
    def __init__(self, family: Family) -> None:
        self.rows = [{"pair": (index, row)} for index, row in enumerate(Examples(family).rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Batched(Examples):
    """Its examples are whole batches."""

    def __getitem__(self, index: int) -> dict:
        return {name: value[None] for name, value in self.rows[index].items()}


def weighted(rows: list[dict]) -> dict:
    """A collator that takes the weights out of its examples."""
    weights = torch.tensor([row.pop("weight", 1.0) for row in rows])
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]), "weight": weights} | {
        "labels": torch.stack([row["input_ids"] for row in rows])
    }


CLIENTS: dict[str, Any] = {
    "a loss that pops entries": lambda family: {
        "trainer_class": Weighted,
        "train_dataset": [{**row, "weight": 2.0} for row in Examples(family).rows],
        "data_collator": weighted,
        "remove_unused_columns": False,
    },
    "a loader without a batch size": lambda family: {
        "trainer_class": Loading,
        "train_dataset": Batched(family),
        "loader": lambda dataset: DataLoader(dataset, batch_size=None),
    },
    "a loader without a dataset": lambda family: {"trainer_class": Loading, "loader": BareLoader},
    "a dataset opened by its workers": lambda family: {
        "trainer_class": Loading,
        "train_dataset": OpenedByWorkers(family),
        "loader": lambda dataset: DataLoader(dataset, batch_size=2, num_workers=1, worker_init_fn=open_in_worker),
    },
    "nested inputs": lambda family: {
        "trainer_class": Nested,
        "train_dataset": Paired(family),
        "data_collator": default_collate,
        "remove_unused_columns": False,
    },
    "a shared stream": lambda family: {"train_dataset": OneStream(family)},
}


def run(family: Family, folder: Path, settings: Any = HALVE, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    loader = kwargs.pop("loader", None)
    trainer = trainer_of(family, folder, settings, **kwargs)
    if loader is not None:
        trainer.make_loader = loader
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", [MAMBA, LRU], ids=lambda family: family.name)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_run_is_cut_whatever_its_batches_come_from(client: str, family: Family, tmp_path: Path) -> None:
    trainer = run(family, tmp_path, **CLIENTS[client](family))
    assert [event.outcome for event in callback_of(trainer).events] == ["cut"]
    assert trainer.state.global_step == 6


def test_a_shared_stream_loses_no_example(tmp_path: Path) -> None:
    seen = []
    for settings in (None, {**HALVE, "end": 4, "num_cuts": 2}):
        trainer = run(MAMBA, tmp_path, settings, train_dataset=OneStream(MAMBA), trainer_class=Seeing)
        seen.append(trainer.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 6


def test_a_collator_that_changes_its_examples_gives_the_same_weights_as_without(tmp_path: Path) -> None:
    weights = []
    for settings in (None, HALVE):
        trainer = run(MAMBA, tmp_path, settings, max_steps=12, **CLIENTS["a loss that pops entries"](MAMBA))
        weights.append(trainer.weights)
    assert weights[0] == weights[1] == [2.0] * 24


def test_a_collator_with_a_generator_of_its_own_draws_on(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    seen = []
    for settings in (None, HALVE, {**HALVE, "max_loss_increase": 100.0}):
        torch.manual_seed(0)
        trainer = trainer_of(
            MAMBA,
            tmp_path,
            settings,
            model=MAMBA.build(vocab_size=len(tokenizer)),
            trainer_class=Seeing,
            eval_dataset=Examples(MAMBA, 4),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=True, seed=7),
        )
        trainer.train()
        seen.append(trainer.seen)
    assert seen[0] == seen[1] == seen[2]


def test_what_a_loss_notes_in_its_trainer_is_noted_once_a_step(tmp_path: Path) -> None:
    """As trl's trainers note their metrics."""

    class Noting(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            notes = vars(self).setdefault("_metrics", {"train": {}, "eval": {}})
            notes["train" if model.training else "eval"].setdefault("calls", []).append(1)
            self.calls = getattr(self, "calls", 0) + 1
            return super().compute_loss(model, *args, **kwargs)

    trainer = run(MAMBA, tmp_path, {**HALVE, "max_loss_increase": 100.0}, trainer_class=Noting)
    assert trainer.calls == 6
    assert trainer._metrics == {"train": {"calls": [1] * 6}, "eval": {}}


@pytest.mark.parametrize("family", [MAMBA, LRU], ids=lambda family: family.name)
def test_a_run_that_cuts_nothing_equals_one_without_the_callback(family: Family, tmp_path: Path) -> None:
    ends = []
    for settings in (None, {"tolerance": 0.0, "end": 4, "num_cuts": 3, "max_loss_increase": 1.0}):
        trainer = run(family, tmp_path, settings, eval_dataset=Examples(family, 4), gradient_accumulation_steps=2)
        log = [
            {key: entry[key] for key in ("loss", "grad_norm") if key in entry} for entry in trainer.state.log_history
        ]
        moments = [state["exp_avg"] for state in trainer.optimizer.state_dict()["state"].values()]
        ends.append(
            [dict(trainer.model.state_dict()), moments, [entry for entry in log if entry], torch.get_rng_state()]
        )
    assert same(ends[0][0], ends[1][0])
    assert all(map(torch.equal, ends[0][1], ends[1][1]))
    assert ends[0][2] == ends[1][2]
    assert torch.equal(ends[0][3], ends[1][3])


def batches_of(folder: Path) -> tuple[list, list]:
    return tuple(read_batches(folder / "compressm_batches_0.safetensors", torch.device("cpu")))


def test_only_checkpoints_close_to_a_cut_keep_batches(tmp_path: Path) -> None:
    settings = {"fraction": 0.5, "start": 4, "end": 5, "num_cuts": 1, "calibration_batches": 2}
    run(MAMBA, tmp_path, settings, **SAVING)
    counts = {
        step: (tmp_path / f"checkpoint-{step}" / "compressm_batches_0.safetensors").exists() for step in range(1, 7)
    }
    assert counts == {1: False, 2: False, 3: False, 4: True, 5: True, 6: False}
    assert [len(batches_of(tmp_path / f"checkpoint-{step}")[0]) for step in (4, 5)] == [1, 2]


@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulating"])
def test_a_run_resumed_around_a_cut_ends_bit_for_bit_the_same(extra: dict, tmp_path: Path) -> None:
    settings = {"fraction": 0.5, "start": 3, "end": 4, "num_cuts": 1, "calibration_batches": 3}
    whole = run(MAMBA, tmp_path, settings, **SAVING, **extra)
    for step in (1, 2, 3, 4, 5):
        torch.manual_seed(1)
        resumed = trainer_of(MAMBA, tmp_path, settings, **SAVING, **extra)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


class Wrapped:
    """A thing that no file can keep."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Unwrapping(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "labels": inputs["labels"].value}, return_outputs, **kwargs)


def wrapped(rows: list[dict]) -> dict:
    batch = default_collate(rows)
    return {**batch, "labels": Wrapped(batch["labels"])}


def test_batches_that_no_file_can_keep_are_told_and_the_cut_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hf_compressm"), "propagate", True)
    client = {"trainer_class": Unwrapping, "data_collator": wrapped, "remove_unused_columns": False, **SAVING}
    run(MAMBA, tmp_path, **client)
    assert "Checkpoints cannot keep the batches before a cut: they hold a Wrapped" in caplog.text
    resumed = trainer_of(MAMBA, tmp_path, HALVE, **client)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "The cut after step 2 waits for one step" in caplog.text
    assert [(event.step, event.outcome) for event in callback_of(resumed).events] == [(3, "cut")]
    again = trainer_of(MAMBA, tmp_path, HALVE, **client)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [event.step for event in callback_of(again).events] == [4]  # that checkpoint could not keep any either


def test_a_loss_that_cannot_be_computed_again_is_an_error_after_the_first_step(tmp_path: Path) -> None:
    class Penalty(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, **kwargs)
            (slope,) = torch.autograd.grad(
                loss, model.get_input_embeddings().weight, create_graph=False, retain_graph=True
            )
            loss = loss + slope.square().sum()
            return (loss, None) if return_outputs else loss

    trainer = trainer_of(MAMBA, tmp_path, {**HALVE, "end": 5}, trainer_class=Penalty)
    with pytest.raises(ValueError, match=r"batch 1 .*cannot be used: RuntimeError.*calibration="):
        trainer.train()
    assert trainer.state.global_step == 1
    run(MAMBA, tmp_path, trainer_class=Penalty, calibration=MAMBA.calibration())
    guarded = {**HALVE, "end": 5, "criterion": "hankel", "max_loss_increase": 1.0}
    trainer = trainer_of(LRU, tmp_path, guarded, trainer_class=Penalty)
    with pytest.raises(ValueError, match="an eval_dataset for a guard"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_trainer_that_computes_no_loss_is_an_error_after_the_first_step(tmp_path: Path) -> None:
    class OwnStep(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            loss = model(**self._prepare_inputs(inputs)).loss
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = trainer_of(MAMBA, tmp_path, {**HALVE, "end": 5}, trainer_class=OwnStep)
    with pytest.raises(ValueError, match=r"OwnStep made a step without calling its compute_loss.*calibration="):
        trainer.train()
    assert trainer.state.global_step == 1


def test_layers_that_need_no_data_keep_no_batch(tmp_path: Path) -> None:
    run(LRU, tmp_path, {**HALVE, "criterion": "hankel"}, **SAVING)
    assert not list(tmp_path.rglob("compressm_batches*"))


def test_a_loader_of_ones_own_is_used_at_every_cut(tmp_path: Path) -> None:
    class Counting:
        rounds = 0

        def __iter__(self) -> Iterator[Any]:
            self.rounds += 1
            yield from MAMBA.calibration(6)
            yield {"input_ids": "never reached"}

    loader = Counting()
    settings = {"fraction": 0.3, "end": 4, "num_cuts": 2, "calibration_batches": 6}
    trainer = run(MAMBA, tmp_path, settings, calibration=loader)
    assert [event.outcome for event in callback_of(trainer).events] == ["cut", "cut"]
    assert loader.rounds == 3  # the first batch is tried before the first step


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        (iter([1]), "calibration is a list_iterator, which is used up by the first cut"),
        ({"input_ids": torch.zeros(1, 4)}, r"calibration is a single dict.*Pass \[batch\]"),
        (torch.zeros(1, 4), "calibration is a Tensor"),
    ],
)
def test_what_is_no_loader_is_refused(calibration: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CompreSSMCallback(HALVE, calibration=calibration)


def test_a_loader_whose_batches_do_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(MAMBA, tmp_path, HALVE, calibration=[{"input_ids": torch.zeros(1, 4)}])
    with pytest.raises(ValueError, match=r"Calibration batch 1 .*cannot be used"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_each_trainer_of_one_callback_has_a_run_of_its_own(tmp_path: Path) -> None:
    callback = CompreSSMCallback(HALVE)
    trainers = [
        trainer_of(MAMBA, tmp_path / str(size), None, model=MAMBA.build(state_size=size), callbacks=[callback])
        for size in (8, 16)
    ]
    for trainer in trainers:
        trainer.train()
    assert callback.events[0].result.state_sizes_before == {f"backbone.layers.{n}.mixer": 16 for n in (0, 1)}
    for trainer, size in zip(trainers, (8, 16), strict=True):
        trainer.save_model(str(tmp_path / "saved"))
        card = (tmp_path / "saved" / "README.md").read_text()
        assert f"{size} states per layer became {size // 2}" in card


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1, dtype=torch.complex128),
        torch.zeros(2, 2).to_sparse(),
        torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged),
        {1: torch.zeros(1)},
        {2.5},
    ],
    ids=["dtype", "sparse", "nested", "keys", "set"],
)
def test_what_no_file_can_keep_is_named_and_leaves_no_file(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsavableBatchError, match=r"in them|they hold a set"):
        write_batches(tmp_path / "batches", [{"a": torch.zeros(1), "b": value}])
    assert not list(tmp_path.iterdir())


def test_batches_come_back_as_they_were_written(tmp_path: Path) -> None:
    shared = torch.arange(6).view(2, 3)
    batches = [{"a": shared, "b": (shared.T, [None, 1, 2.5, True, "text"])}, [shared[0]], {}]
    write_batches(tmp_path / "batches", batches)
    found = read_batches(tmp_path / "batches", torch.device("cpu"))
    assert same(found[0]["a"], shared)
    assert same(found[0]["b"][0], shared.T)
    assert found[0]["b"][1] == [None, 1, 2.5, True, "text"]
    assert isinstance(found[0]["b"], tuple)
    assert same(found[1][0], shared[0])
    before = (tmp_path / "batches").read_bytes()
    write_batches(tmp_path / "again", batches)
    assert (tmp_path / "again").read_bytes() == before
    wave = torch.tensor([1 + 2j])
    write_batches(tmp_path / "again", [wave.conj()])
    assert same(read_batches(tmp_path / "again", torch.device("cpu"))[0], wave.conj().resolve_conj())
    (tmp_path / "batches").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="batches cannot be read as batches"):
        read_batches(tmp_path / "batches", torch.device("cpu"))
