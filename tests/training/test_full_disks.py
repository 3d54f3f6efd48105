"""Disks that are full, read-only or gone: the error reaches the user, and the run goes on from what is whole."""

import errno
import os
import pkgutil
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from hf_compressm import find_last_complete_checkpoint
from hf_compressm.checkpoints import read_saved, wait_for_seal
from hf_compressm.files.atomic import sync_and_sum
from hf_compressm.files.names import HISTORY_FILE, SEAL
from tests.family_table import LRU, same
from tests.trainers import trainer_of
from tests.training.test_loading import outcome


CUT = 3
LAST = 6
SETTINGS = {"fraction": 0.5, "end": CUT, "num_cuts": 1}
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # of Python, safetensors and torch.save
"""What a write raises where the file system refuses it."""

WRITES = {
    "weights": ("transformers.modeling_utils.safe_save_file", "model.safetensors", CUT),
    "config": ("transformers.PreTrainedConfig.to_json_file", "config.json", CUT),
    "optimizer": ("torch.save", "optimizer.pt", CUT),
    "trainer's state": ("transformers.TrainerState.save_to_json", "trainer_state.json", CUT),
    "history": ("hf_compressm.training.run.write_json", HISTORY_FILE, CUT),
    "flush": ("hf_compressm.checkpoints.seal.sync_and_sum", "optimizer.pt", CUT + 1),
    "seal": ("hf_compressm.checkpoints.seal.write_json", SEAL, CUT + 1),
}
"""The function that writes, its file, and the checkpoint to go on from: one that only lacks the seal is whole."""


class At(TrainerCallback):
    """Does something at the start of the step after the cut, once the checkpoint before it is sealed."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == CUT:
            wait_for_seal(Path(args.output_dir) / f"checkpoint-{CUT}")
            self.action()


def run(folder: Path, action: Callable[[], Any] | None = None, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    callbacks = [At(action)] if action else []
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": LAST, **kwargs}
    trainer = trainer_of(LRU, folder, SETTINGS, callbacks=callbacks, **saving)
    trainer.train(resume_from_checkpoint=find_last_complete_checkpoint(folder))
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(run(tmp_path_factory.mktemp("whole")))


def assert_goes_on(folder: Path, step: int, whole: dict[str, Any]) -> None:
    """The checkpoint of that step is the last complete one, and the run that goes on from it ends like the whole."""
    assert find_last_complete_checkpoint(folder) == str(folder / f"checkpoint-{step}")
    resumed = outcome(run(folder))
    assert [part for part in whole if not same(whole[part], resumed[part])] == []


def full_once(is_full: list[bool], real: Callable, name: str) -> Callable:
    """The function that writes a file, which leaves half of it and an error once the disk is said to be full."""

    def write(*args: Any, **kwargs: Any) -> Any:
        path = next((Path(value) for value in args if isinstance(value, str | Path)), Path())
        if path.name != name or not is_full:
            return real(*args, **kwargs)
        if name not in (HISTORY_FILE, SEAL):  # which are renamed into place, or not
            if not path.exists():
                real(*args, **kwargs)
            if real is not sync_and_sum:
                os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return write


@pytest.mark.parametrize(("function", "name", "step"), WRITES.values(), ids=WRITES)
def test_a_full_disk_reaches_the_user_and_leaves_what_was_whole(
    function: str, name: str, step: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    is_full: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, full_once(is_full, pkgutil.resolve_name(function), name))
        with pytest.raises(OSError, match="No space left") as caught:
            run(tmp_path, lambda: is_full.append(True))
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / f"checkpoint-{CUT + 1}" / SEAL).exists()
    read_saved(tmp_path / f"checkpoint-{CUT}")
    assert_goes_on(tmp_path, step, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, mounted anew with the options it is given."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no mount")
    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an error that was caught may hold a file open


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere_in_a_checkpoint_leaves_the_earlier_one(
    whole: dict[str, Any], small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    run(tmp_path / "measured")
    size = sum(-(-file.stat().st_size // 4096) for file in (tmp_path / "measured" / f"checkpoint-{LAST}").iterdir())
    folder, ends = small_disk("size=64m"), []
    for pages in range(3 * size, 4 * size + 4, 3):
        small_disk(f"remount,size={4 * pages}k")
        with pytest.raises(WRITE_ERRORS, match="No space left") as caught:
            run(folder / "run")
        torn = max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        newest = max(torn.iterdir(), key=lambda path: path.stat().st_mtime_ns, default=torn)
        ends.append(f"{pages} pages: {torn.name}/{newest.name}: {type(caught.value).__name__}: {caught.value!s:.60}")
        assert not (torn / SEAL).exists()
        last = find_last_complete_checkpoint(folder / "run")
        assert last is not None
        small_disk("remount,size=64m")
        assert_goes_on(folder / "run", int(Path(last).name[11:]), whole)
        shutil.rmtree(folder / "run")
    print("", *ends, sep="\n")


@pytest.mark.parametrize("when", ["before the run", "after the cut"])
def test_a_read_only_directory_is_an_error(
    when: str, whole: dict[str, Any], small_disk: Callable[[str], Path]
) -> None:
    folder = small_disk("size=64m")
    before = when == "before the run"
    if before:
        small_disk("remount,ro")
    with pytest.raises(WRITE_ERRORS, match="Read-only"):
        run(folder / "run", None if before else lambda: small_disk("remount,ro"))
    small_disk("remount,rw")
    if not before:
        assert_goes_on(folder / "run", CUT, whole)


def test_a_directory_that_is_removed_is_made_again_and_its_checkpoints_are_whole(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    ended = outcome(run(tmp_path / "run", lambda: shutil.rmtree(tmp_path / "run")))
    assert same(whole["weights"], ended["weights"])
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in range(CUT + 1, LAST + 1)
    ]
    assert find_last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{LAST}")


def test_a_directory_that_is_removed_in_the_middle_of_a_save_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = Trainer._save_optimizer_and_scheduler

    def gone(self: Trainer, folder: str) -> None:
        if self.state.global_step > CUT:
            shutil.rmtree(tmp_path / "run")
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", gone)
    with pytest.raises(WRITE_ERRORS, match=r"does not exist|No such file"):
        run(tmp_path / "run")
    assert find_last_complete_checkpoint(tmp_path / "run") is None
