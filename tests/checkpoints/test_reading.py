"""A checkpoint is read once: its headers, its configuration and its checksums, from the search to the resumed run."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_compressm import find_last_complete_checkpoint
from hf_compressm.checkpoints import read_saved, reading, seal
from hf_compressm.checkpoints.reading import SETTLED_NANOSECONDS
from hf_compressm.files import weights
from hf_compressm.training import loading
from tests.family_table import JAMBA, LRU, MAMBA, MAMBA2, Family, family_id
from tests.trainers import trainer_of


STEP = 3


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's header, JSON or bytes were read by this package."""
    found: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            found[f"{name} {Path(path).name}"] += 1
            return function(path, *args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(weights, "safe_open")
    counted(reading, "read_json")
    counted(seal, "sum_of")
    return found


@pytest.fixture(params=[LRU, MAMBA, MAMBA2, JAMBA], ids=family_id)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Family, Path]:
    """A run with a cut after step 2, and its checkpoints, old enough for their time stamps to be trusted."""
    family = request.param
    trainer_of(family, tmp_path / "first", save_strategy="steps", save_steps=STEP, max_steps=STEP + 1).train()
    shutil.copytree(tmp_path / "first", tmp_path / "run")
    wait(tmp_path / "run")
    return family, tmp_path / "run"


def wait(folder: Path) -> None:
    """Until the newest file is settled."""
    import time

    newest = max(path.stat().st_ctime_ns for path in folder.rglob("*"))
    while time.time_ns() - newest <= SETTLED_NANOSECONDS:
        time.sleep(0.001)


def test_one_resume_reads_and_sums_everything_once(run: tuple[Family, Path], counts: Counter[str]) -> None:
    family, folder = run
    last = find_last_complete_checkpoint(folder)
    assert last is not None
    sealed = set(counts)
    trainer = trainer_of(family, folder, max_steps=STEP + 1)
    loader = trainer._load_from_checkpoint
    loader(last)
    assert set(counts) == sealed  # the search has read all that loading asks for
    assert counts["safe_open model.safetensors"] == 1
    assert counts["read_json config.json"] == 1
    sums = {name: count for name, count in counts.items() if name.startswith("sum_of")}
    assert {"sum_of model.safetensors", "sum_of optimizer.pt", "sum_of config.json"} <= set(sums)
    assert set(sums.values()) == {1}
    assert trainer.model.config.compressm["cuts"][0]["step"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer_state.json", "optimizer.pt"])
def test_a_file_that_changed_since_is_read_again(name: str, tmp_path: Path) -> None:
    trainer_of(LRU, tmp_path, save_strategy="steps", save_steps=STEP, max_steps=STEP).train()
    folder = tmp_path / f"checkpoint-{STEP}"
    wait(folder)
    first = read_saved(folder)
    assert read_saved(folder) is first
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its content"):
        read_saved(folder)


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path) -> None:
    trainer_of(LRU, tmp_path, save_strategy="steps", save_steps=STEP, max_steps=STEP).train()
    folder = tmp_path / f"checkpoint-{STEP}"
    (folder / "notes.txt").write_text("new")
    assert read_saved(folder) is not read_saved(folder)


def test_loading_is_the_only_way_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Trainer's wrapped method reads through `read_saved`, so that the counts above are those of a run."""
    trainer_of(LRU, tmp_path, save_strategy="steps", save_steps=STEP, max_steps=STEP).train()
    seen: list[str] = []
    monkeypatch.setattr(loading, "read_saved", lambda folder: seen.append(Path(folder).name) or read_saved(folder))
    trainer = trainer_of(LRU, tmp_path, max_steps=STEP + 1)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEP}"))
    assert seen == [f"checkpoint-{STEP}"]
