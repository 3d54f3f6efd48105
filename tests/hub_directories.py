"""Directories to push, with all that a run leaves beside the model."""

import json
from pathlib import Path

from hf_compressm.checkpoints.seal import seal_checkpoint
from hf_compressm.files.names import HISTORY_FILE
from tests.family_table import LRU, S5, Family


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja")
OWN = ("README.md", "compressm_history.json", "compressm_figures/spectra.png")
EMPTY_HISTORY = '{"schema_version": 1, "events": []}'
LEFT = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    ".hidden.json",
    "train.py",
    "model-00009-of-00009.safetensors",
    "compressm_figures/notes.txt",
    "compressm_figures/.hidden.png",
)
LEFT_FOLDERS = ("checkpoint-3/", "runs/", ".cache/")


def fill(path: Path, text: str = "{}") -> None:
    """Write a file with little in it; a history has no cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = EMPTY_HISTORY if path.name == HISTORY_FILE else text
    path.write_text(text, encoding="utf-8")


def saved_model(folder: Path, family: Family = LRU, **kwargs: object) -> Path:
    """A model alone, as `save_pretrained` writes it."""
    family.build(seed=int(str(kwargs.pop("seed", 0)))).save_pretrained(folder, **kwargs)
    return folder


def sealed_checkpoint(folder: Path, family: Family = S5) -> Path:
    """A model among everything that a Trainer, this package and a user put beside it, sealed."""
    saved_model(folder, family)
    for name in (*TOKENIZER, *OWN, *LEFT):
        if not name.endswith((".pt", ".pth")):
            fill(folder / name)
    for name in LEFT_FOLDERS:
        fill(folder / name / "inside.json")
    for name in (name for name in LEFT if name.endswith((".pt", ".pth"))):
        (folder / name).write_bytes(b"PK\5\6" + bytes(18))  # an archive with nothing in it
    seal_checkpoint(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_count(tree: dict[str, bytes]) -> int:
    """How many shards the index of a repo names, after making sure that these are all the weights that are there."""
    named = set(json.loads(tree["model.safetensors.index.json"])["weight_map"].values())
    assert named == {name for name in tree if name.endswith(".safetensors")}
    return len(named)
