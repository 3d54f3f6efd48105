"""Checkpoints are sealed while training goes on, and nothing reads, removes or outruns one that is not sealed yet."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from hf_compressm import find_last_complete_checkpoint
from hf_compressm.checkpoints import Sealing, read_saved, seal_checkpoint, sealing
from hf_compressm.files.names import SEAL
from hf_compressm.training import loading
from hf_compressm.training.recovery import keep_checkpoint
from tests.family_table import LRU
from tests.trainers import Examples, trainer_of


PATIENCE = 60
"""Seconds after which a thread counts as stuck."""
LONG_ENOUGH = 0.3
"""Seconds in which a caller that does not wait has gone on."""
EACH_STEP: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


class Gate:
    """Holds every sealing up until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.arrived = threading.Event()

    def __call__(self, directory: Path, files: list[Path]) -> None:
        self.arrived.set()
        assert self.opened.wait(PATIENCE)
        seal_checkpoint(directory, files)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(sealing, "seal_checkpoint", gate)
    yield gate
    gate.opened.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/weights").write_bytes(b"weights")
    return tmp_path / "checkpoint-1"


def in_background(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def assert_waits(work: Callable[[], Any], gate: Gate, folder: Path) -> None:
    """The work is not done until the checkpoint is sealed."""
    sealed: list[bool] = []
    thread = in_background(lambda: (work(), sealed.append((folder / SEAL).exists())))
    thread.join(LONG_ENOUGH)
    assert thread.is_alive()
    gate.opened.set()
    thread.join(PATIENCE)
    assert sealed == [True]


class Steps(TrainerCallback):
    """Notes which checkpoints have no seal when a step begins, and then opens the gate."""

    def __init__(self, gate: Gate, folder: Path) -> None:
        self.gate, self.folder, self.unsealed = gate, folder, set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            assert self.gate.arrived.wait(PATIENCE)
            self.unsealed |= {path.name for path in self.folder.glob("checkpoint-*") if not (path / SEAL).exists()}
            self.gate.opened.set()


def test_training_goes_on_while_a_checkpoint_is_sealed_and_the_next_one_waits(gate: Gate, tmp_path: Path) -> None:
    steps = Steps(gate, tmp_path)
    trainer_of(LRU, tmp_path, callbacks=[steps], **EACH_STEP).train()
    assert "checkpoint-1" in steps.unsealed  # while the second step was made
    assert all((tmp_path / f"checkpoint-{step}" / SEAL).exists() for step in range(1, 5))
    assert all(read_saved(tmp_path / f"checkpoint-{step}").is_sealed for step in range(1, 5))


def test_only_one_checkpoint_is_sealed_at_a_time_and_rotation_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def slow(directory: Path, files: list[Path]) -> None:
        time.sleep(0.05)
        assert directory.is_dir()
        seen.append([thread.name for thread in threading.enumerate() if thread.name.startswith("seal ")])
        seal_checkpoint(directory, files)

    monkeypatch.setattr(sealing, "seal_checkpoint", slow)
    trainer_of(LRU, tmp_path, save_total_limit=1, **EACH_STEP).train()
    assert seen == [[f"seal checkpoint-{step}"] for step in range(1, 5)]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert read_saved(tmp_path / "checkpoint-4").is_sealed


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def seal(directory: Path, files: list[Path]) -> None:
        time.sleep(LONG_ENOUGH)
        seal_checkpoint(directory, files)

    monkeypatch.setattr(sealing, "seal_checkpoint", seal)


@pytest.mark.parametrize("best", [False, True])
def test_training_ends_once_all_is_sealed(
    best: bool, slow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []
    monkeypatch.setattr(loading, "fit_to_checkpoint", lambda model, saved, optimizer: loaded.append(saved.is_sealed))
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4} if best else {}
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "eval_dataset": Examples(LRU, 4)}
    trainer_of(LRU, tmp_path, **saving, **settings).train()
    assert (tmp_path / "checkpoint-4" / SEAL).exists()
    assert loaded == [True] * best


def test_reading_waits_for_the_seal(gate: Gate, folder: Path) -> None:
    def read() -> None:
        with pytest.raises(ValueError, match="no weights"):
            read_saved(folder).verify()

    Sealing().start(folder)
    assert_waits(read, gate, folder)


def test_a_checkpoint_from_before_a_cut_is_kept_with_its_seal(slow: None, folder: Path) -> None:
    Sealing().start(folder)
    assert (folder.parent / keep_checkpoint(folder) / SEAL).exists()


def test_an_exception_in_training_loses_no_seal(slow: None, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(LRU, tmp_path, callbacks=[Stop()], **EACH_STEP).train()
    assert not (tmp_path / "checkpoint-1" / SEAL).exists()
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert read_saved(tmp_path / "checkpoint-1").is_sealed
    trainer = trainer_of(LRU, tmp_path, **EACH_STEP)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 4


class Failing:
    """Cannot seal one checkpoint."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, directory: Path, files: list[Path]) -> None:
        if directory.name == self.name:
            raise OSError(5, "Input/output error", str(directory))
        seal_checkpoint(directory, files)


@pytest.mark.parametrize(("step", "reached"), [(1, 2), (4, 4)], ids=["at the next save", "at the end"])
def test_an_error_is_logged_and_raised_where_the_trainer_passes_next(
    step: int, reached: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(sealing, "seal_checkpoint", Failing(f"checkpoint-{step}"))
    monkeypatch.setattr(sealing.logger, "error", logged.append)
    trainer: Trainer = trainer_of(LRU, tmp_path, **EACH_STEP)
    with pytest.raises(OSError, match="Input/output error"):
        trainer.train()
    assert trainer.state.global_step == reached
    assert not (tmp_path / f"checkpoint-{step}" / SEAL).exists()
    assert not (tmp_path / f"checkpoint-{step + 1}").exists()
    assert [f"checkpoint-{step} has no seal" in text for text in logged] == [True]
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")  # which is whole


def test_a_checkpoint_that_somebody_removes_meanwhile_is_no_error(gate: Gate, folder: Path) -> None:
    under_way = Sealing()
    under_way.start(folder)
    (folder / "weights").unlink()
    folder.rmdir()
    gate.opened.set()
    under_way.wait()
    assert not folder.exists()


class OnSave(TrainerCallback):
    """Does something to the first checkpoint once the Trainer has saved it, while it is being sealed."""

    def __init__(self, gate: Gate, work: Callable[[Path], Any]) -> None:
        self.gate, self.work = gate, work

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.work(Path(args.output_dir) / "checkpoint-1")
        self.gate.opened.set()


def test_files_that_another_callback_adds_are_not_sealed(gate: Gate, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        (folder / "notes.txt").write_text("half of")

    trainer_of(LRU, tmp_path, callbacks=[OnSave(gate, add)], **EACH_STEP).train()
    (tmp_path / "checkpoint-1/notes.txt").write_text("half of a line, and the rest")
    assert read_saved(tmp_path / "checkpoint-1").is_sealed


def test_training_goes_on_where_another_callback_removes_a_file(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(sealing.logger, "warning", warned.append)
    callback = OnSave(gate, lambda folder: (folder / "training_args.bin").unlink())
    trainer = trainer_of(LRU, tmp_path, callbacks=[callback], **EACH_STEP)
    trainer.train()
    assert trainer.state.global_step == 4
    assert any("checkpoint-1 has no seal" in text for text in warned)
    assert not (tmp_path / "checkpoint-1" / SEAL).exists()


def test_a_loss_that_a_user_logs_waits_for_no_seal(gate: Gate, tmp_path: Path) -> None:
    """It may be logged in one process alone, where to wait for the others is to wait for ever."""
    sealed: list[bool] = []

    def log(folder: Path) -> None:
        trainer.log({"train_loss": 1.0})
        sealed.append((folder / SEAL).exists())

    trainer = trainer_of(LRU, tmp_path, callbacks=[OnSave(gate, log)], **EACH_STEP)
    trainer.train()
    assert sealed == [False]


def test_an_error_is_raised_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "seal_checkpoint", Failing(folder.name))
    monkeypatch.setattr(sealing.logger, "error", lambda text: None)
    under_way = Sealing()
    under_way.start(folder)
    assert not under_way.has_sealed()
    with pytest.raises(OSError, match="Input/output error"):
        under_way.wait()
    under_way.wait()


def test_without_another_thread_the_seal_is_made_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("hf_compressm.checkpoints.sealing.Thread.start", no_thread)
    sealing = Sealing()
    sealing.start(folder)
    assert (folder / SEAL).exists()
    sealing.wait()


def test_a_process_that_ends_seals_first(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hf_compressm.checkpoints import sealing\n"
        "seal = sealing.seal_checkpoint\n"
        "sealing.seal_checkpoint = lambda *given: (time.sleep(0.3), seal(*given))\n"
        "sealing.Sealing().start(Path(sys.argv[1])); sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 3
    assert (folder / SEAL).exists()
