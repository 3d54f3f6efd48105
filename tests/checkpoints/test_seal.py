"""Checkpoints of a real run, whole and broken in every way that a crash, a disk or a stranger may break them."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging

from hf_compressm import compress_checkpoint, find_last_complete_checkpoint
from hf_compressm.checkpoints import read_saved, seal_checkpoint
from hf_compressm.files.names import HISTORY_FILE, SEAL, TRAINER_STATE_FILE, UNFINISHED_FILE
from hf_compressm.files.weights import read_headers
from tests.family_table import LRU
from tests.trainers import trainer_of


INDEX = "model.safetensors.index.json"
KINDS = ("single", "sharded")
LAST = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output directories of two finished runs, that of each kind with a cut and checkpoints 3 and 4."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        trainer = trainer_of(
            LRU, folders[kind], save_strategy="steps", save_steps=1, max_steps=LAST, save_total_limit=2
        )
        if kind == "sharded":
            save = trainer.model.save_pretrained
            trainer.model.save_pretrained = lambda *args, own=save, **kw: own(*args, **{**kw, "max_shard_size": "1KB"})
        trainer.train()
    return folders


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the last checkpoint, to be broken; the one before it is beside it."""
    shutil.copytree(runs[request.param], tmp_path / "run")
    return tmp_path / "run" / f"checkpoint-{LAST}"


@pytest.fixture
def warnings_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_compressm.checkpoints.reading"), "warning", seen.append)
    return seen


def unsealed(folder: Path) -> Path:
    (folder / SEAL).unlink()
    return folder


def last(folder: Path) -> str | None:
    found = find_last_complete_checkpoint(folder.parent)
    return found and Path(found).name


def refused(folder: Path, name: str) -> None:
    """The checkpoint is refused, with the file's name in the error, and the one before it is found instead."""
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_saved(folder)
    assert last(folder) == f"checkpoint-{LAST - 1}"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "eight bytes": lambda content: content[:8],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one bit flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "one bit flipped in the middle": lambda content: flipped(content, len(content) // 2, 3),
    "one bit flipped at the end": lambda content: flipped(content, len(content) - 1, 7),
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"\0",
}


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_a_seal_lists_every_file_and_the_checkpoint_is_the_last_complete_one(folder: Path) -> None:
    read_saved(folder)
    listed = json.loads((folder / SEAL).read_text())["files"]
    assert set(listed) == {path.name for path in folder.iterdir()} - {SEAL}
    assert {HISTORY_FILE, TRAINER_STATE_FILE, "optimizer.pt", "config.json"} < set(listed)
    assert last(folder) == folder.name


def test_files_in_folders_are_sealed_too(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "notes.txt").write_text("a")
    seal_checkpoint(folder)
    read_saved(folder)
    (folder / "inner" / "notes.txt").write_text("b")
    refused(folder, "notes.txt")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_sealed_checkpoint_is_named(
    folder: Path, damage: str, warnings_seen: list[str]
) -> None:
    names = set(json.loads((folder / SEAL).read_text())["files"])
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(DAMAGES[damage](content))
        refused(folder, name)
        (folder / name).write_bytes(content)
    assert len(warnings_seen) == len(names)
    assert all(message.startswith(f"{folder.name} is passed over") for message in warnings_seen)
    assert last(folder) == folder.name


def test_a_missing_file_of_a_sealed_checkpoint_is_named(folder: Path) -> None:
    for name in json.loads((folder / SEAL).read_text())["files"]:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(folder, name)
        (folder / name).write_bytes(content)


def test_a_checkpoint_without_a_seal_counts_if_it_is_whole(folder: Path) -> None:
    read_saved(unsealed(folder))
    assert last(folder) == folder.name


def needed(folder: Path) -> list[str]:
    """The files without which a run does not go on."""
    suffixes = (".safetensors", ".pt", ".pth")
    names = [path.name for path in folder.iterdir() if path.name.endswith(suffixes)]
    return [*names, "config.json", TRAINER_STATE_FILE, *([INDEX] if (folder / INDEX).exists() else [])]


@pytest.mark.parametrize("damage", ["empty", "one byte", "eight bytes", "half", "zeros"])
def test_a_torn_file_of_an_unsealed_checkpoint_is_named(folder: Path, damage: str) -> None:
    for name in needed(unsealed(folder)):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(DAMAGES[damage](content))
        refused(folder, name)
        (folder / name).write_bytes(content)


def test_an_unsealed_file_that_lacks_its_last_bytes_is_named(folder: Path) -> None:
    for name in needed(unsealed(folder)):
        content = (folder / name).read_bytes()
        for short in (2, 3, 20, 100):
            (folder / name).write_bytes(content[:-short])
            refused(folder, name)
        (folder / name).write_bytes(content)


def test_an_unsealed_checkpoint_without_weights_config_or_state_does_not_count(folder: Path) -> None:
    unsealed(folder)
    for name in (TRAINER_STATE_FILE, *(path.name for path in folder.glob("*.safetensors"))):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert last(folder) == f"checkpoint-{LAST - 1}", name
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "model.safetensors", INDEX, SEAL])
def test_any_flipped_bit_is_refused_or_leaves_the_file_readable(runs: dict[str, Path], name: str) -> None:
    folder = runs["sharded" if name == INDEX else "single"] / f"checkpoint-{LAST}"
    seal, path = (folder / SEAL).read_bytes(), folder / name
    content = path.read_bytes()
    if name != SEAL:
        unsealed(folder)
    try:
        for place in range(0, min(len(content), 4000), 7):
            path.write_bytes(flipped(content, place, place % 8))
            with contextlib.suppress(ValueError):
                read_saved(folder)
    finally:
        path.write_bytes(content)
        (folder / SEAL).write_bytes(seal)
    read_saved(folder)


@pytest.fixture
def index(runs: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(runs["sharded"], tmp_path / "run")
    return unsealed(tmp_path / "run" / f"checkpoint-{LAST}") / INDEX


def placed(index: Path, name: object) -> None:
    """Write the index with another shard for its first tensor."""
    values = json.loads(index.read_text())
    values["weight_map"][next(iter(values["weight_map"]))] = name
    index.write_text(json.dumps(values))


def test_an_index_that_names_a_missing_shard_is_refused(index: Path) -> None:
    placed(index, "model-00009-of-00003.safetensors")
    refused(index.parent, "model-00009-of-00003.safetensors")


@pytest.mark.parametrize(
    "name",
    ["../x", "../checkpoint-3/model.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "x" * 5000, 3, None],
)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(index: Path, name: object) -> None:
    (index.parent.parent / "x").write_bytes(b"outside")
    placed(index, name)
    refused(index.parent, INDEX)


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", {"a": ["b"]}, {"a": {"b": "c"}}], ids=str)
def test_an_index_without_a_map_is_refused(index: Path, weight_map: object) -> None:
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(index.parent, INDEX)


def test_a_tensor_that_its_shard_does_not_have_is_named(index: Path) -> None:
    values = json.loads(index.read_text())
    values["weight_map"]["absent.weight"] = sorted(values["weight_map"].values())[0]
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"safetensors lacks 'absent\.weight'"):
        read_headers(index.parent)


def test_shards_have_the_shapes_of_the_single_file(runs: dict[str, Path]) -> None:
    one, many = (read_headers(runs[kind] / f"checkpoint-{LAST}") for kind in KINDS)
    assert {name: header[:2] for name, header in one.items()} == {name: header[:2] for name, header in many.items()}
    assert len(list((runs["sharded"] / f"checkpoint-{LAST}").glob("*.safetensors"))) > 1


SEALS: dict[str, object] = {
    "of a newer version": {"schema_version": 2, "files": {}},
    "of no version": {"files": {}},
    "of a version in words": {"schema_version": "1", "files": {}},
    "without files": {"schema_version": 1},
    "with a list of files": {"schema_version": 1, "files": ["config.json"]},
    "with a file that is no entry": {"schema_version": 1, "files": {"config.json": 3}},
    "with an empty entry": {"schema_version": 1, "files": {"config.json": {}}},
    "with a path upwards": {"schema_version": 1, "files": {"../x": {"bytes": 1, "crc32": 0}}},
    "with a path of its own": {"schema_version": 1, "files": {"/etc/hostname": {"bytes": 1, "crc32": 0}}},
    "with an endless name": {"schema_version": 1, "files": {"x" * 5000: {"bytes": 1, "crc32": 0}}},
    "with a name that no file has": {"schema_version": 1, "files": {"a\0b": {"bytes": 1, "crc32": 0}}},
    "that is a list": [1],
    "that is a number": 3,
}


@pytest.mark.parametrize("seal", SEALS.values(), ids=SEALS)
def test_a_seal_that_says_something_else_is_refused(folder: Path, seal: object) -> None:
    (folder / SEAL).write_text(json.dumps(seal))
    refused(folder, str(folder))


def test_an_interrupted_just_in_time_checkpoint_does_not_count(folder: Path) -> None:
    (folder / UNFINISHED_FILE).touch()
    refused(folder, UNFINISHED_FILE)


def test_an_adapter_has_to_be_whole_too(folder: Path) -> None:
    weights = next(iter(folder.glob("*.safetensors")))
    unsealed(folder)
    (folder / "adapter_model.safetensors").write_bytes(weights.read_bytes())
    read_saved(folder)
    (folder / "adapter_model.safetensors").write_bytes(weights.read_bytes()[:-5])
    refused(folder, "adapter_model.safetensors")


def test_other_folders_and_files_are_no_checkpoints(folder: Path) -> None:
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-99-old", "_before-cut-checkpoint-98", "xcheckpoint-97"):
        shutil.copytree(folder, folder.with_name(name))
    folder.with_name("checkpoint-96").write_text("a file")
    folder.with_name("checkpoint-95").mkdir()
    assert last(folder) == folder.name


def test_steps_are_compared_as_numbers(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("checkpoint-10"))
    assert last(folder) == "checkpoint-10"


def test_where_there_is_nothing_to_go_on_from_training_starts_afresh(folder: Path, tmp_path: Path) -> None:
    assert find_last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "empty").mkdir()
    assert find_last_complete_checkpoint(tmp_path / "empty") is None
    for path in folder.parent.glob("checkpoint-*"):
        (path / "config.json").write_text("")
    assert find_last_complete_checkpoint(folder.parent) is None


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        read_saved(tmp_path / "nowhere")


def test_a_seal_is_not_written_where_the_files_cannot_be_flushed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_compressm.checkpoints.seal.sync_and_sum", full)
    unsealed(folder)
    with pytest.raises(OSError, match="No space"):
        seal_checkpoint(folder)
    assert not (folder / SEAL).exists()


def test_checkpoints_are_sealed_read_and_cut_where_reading_is_not_enough_to_flush(
    windows: None, runs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["single"], tmp_path / "run")
    folder = tmp_path / "run" / f"checkpoint-{LAST}"
    (folder / SEAL).unlink()
    seal_checkpoint(folder)
    assert read_saved(folder).is_sealed
    assert find_last_complete_checkpoint(tmp_path / "run") == str(folder)
    compress_checkpoint(folder, tmp_path / "cut" / folder.name, {"fraction": 0.5})
    assert read_saved(tmp_path / "cut" / folder.name).is_sealed


def test_a_run_seals_its_checkpoints_where_reading_is_not_enough_to_flush(windows: None, tmp_path: Path) -> None:
    trainer_of(LRU, tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    assert read_saved(tmp_path / "checkpoint-3").is_sealed


@pytest.mark.parametrize("name", ["/etc/passwd", "../config.json", "a/../../config.json"])
def test_a_seal_names_only_files_of_its_checkpoint(name: str, folder: Path) -> None:
    seal = json.loads((folder / SEAL).read_text())
    (folder / SEAL).write_text(json.dumps({**seal, "files": {name: {"bytes": 1, "crc32": 1}}}))
    with pytest.raises(ValueError, match="is not a file of this checkpoint"):
        read_saved(folder)
