"""The files of a directory that make up the model: they go to the Hub, the state of a training run does not."""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_compressm.checkpoints import SavedModel
from hf_compressm.files.atomic import read_json
from hf_compressm.files.names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    BASE_FOLDER,
    CARD_FILE,
    CONFIG_FILE,
    FIGURES_FOLDER,
    TRAINER_STATE_FILE,
)
from hf_compressm.files.weights import adapter_folders
from hf_compressm.utils.checks import quoted


MODEL_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.jinja",
    CARD_FILE,
    "LICENSE",
    "LICENSE.md",
    "NOTICE",
)
"""Configurations, tokenizers and processors, the history, the card; weights and code are chosen one by one."""
IMAGES = ("*.png", "*.svg", "*.pdf")
TEMPLATES_FOLDER = "additional_chat_templates"
_WEIGHTS = ("model", "pytorch_model", "adapter_model")
STALE = (
    *(
        f"{kind}{ending}"
        for kind in _WEIGHTS
        for ending in (".safetensors", "-*-of-*.safetensors", ".bin", "-*-of-*.bin")
    ),
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""Files of an earlier push that a loader would mistake for a part of the model that is pushed now."""


def choose_files(saved: SavedModel) -> dict[str, Path]:
    """The files that make up a model, by their names in a repo.

    These are weights, configurations, files of tokenizer and processor, the code that `auto_map` names with what it
    imports, README.md and licence, the history of cuts, the folder `compressm_figures`, and for a PEFT model all its
    adapters and its `base_model`. Optimizer, scheduler, generator states and the Trainer's own state are left
    out, and so is the seal, which lists them.

    Raises:
        ValueError: naming the file, if it cannot go to the Hub.
    """
    root = saved.directory
    chosen = _of_a_model(root, saved)
    for folder in {root / BASE_FOLDER, *adapter_folders(root, ADAPTER_CONFIG)} - {root}:
        if folder.is_dir():
            chosen += _of_a_model(folder, saved.base if folder.name == BASE_FOLDER else None)
    chosen += [path for path in sorted((root / FIGURES_FOLDER).glob("*")) if _matches(path, IMAGES)]
    return {_name_in_repo(path, root): path for path in sorted(chosen)}


def left_behind(directory: Path, chosen: Mapping[str, Path]) -> list[str]:
    """The files and folders that are not pushed; names of folders end in `/`, and their contents are not listed."""
    folders = {parent for name in chosen for parent in Path(name).parents}
    found = []
    for folder in sorted(folders | {Path()}):
        for path in sorted((directory / folder).iterdir()):
            name = path.relative_to(directory)
            if name.as_posix() not in chosen and name not in folders:
                found.append(name.as_posix() + "/" * path.is_dir())
    return sorted(found)


def stale_files(names: set[str], present: set[str]) -> list[str]:
    """The files of a repo to delete when files of these names are pushed: old weights, and a base no longer needed."""
    has_base = any(name.startswith(f"{BASE_FOLDER}/") for name in names)
    patterns = [*STALE, *(f"{BASE_FOLDER}/{pattern}" for pattern in (STALE if has_base else ["*"]))]
    return sorted(name for name in present - names if any(_fits(name, pattern) for pattern in patterns))


def _of_a_model(folder: Path, saved: SavedModel | None) -> list[Path]:
    """The files of one folder that belong to a model or adapter."""
    headers = saved.headers.values() if saved is not None else ()
    weights, index = {folder / ADAPTER_FILE, *(header.file for header in headers)}, folder / SAFE_WEIGHTS_INDEX_NAME
    code, unwanted = _code(folder), {folder / TRAINER_STATE_FILE}
    if folder / SAFE_WEIGHTS_NAME in weights:  # which a loader prefers to an index that is left from an earlier save
        unwanted.add(index)
    templates = [path for path in (folder / TEMPLATES_FOLDER).glob("*") if _matches(path, ("*.jinja",))]
    return templates + [
        path
        for path in folder.iterdir()
        if path in weights or path in code or (_matches(path, MODEL_FILES) and path not in unwanted)
    ]


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a path is chosen by its name; hidden files and folders are not."""
    return not path.name.startswith(".") and not path.is_dir() and any(fnmatch(path.name, each) for each in patterns)


def _fits(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern, folder by folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _code(folder: Path) -> set[Path]:
    """The modules that configurations name, and the modules beside them that these import."""
    configurations = sorted({*folder.glob(CONFIG_FILE), *folder.glob("[!.]*_config.json")})
    files: set[Path] = set()
    for path in {folder / f"{name}.py" for file in configurations for name in _modules(read_json(file), file)}:
        try:
            files |= {path, *(folder / Path(other).name for other in get_relative_import_files(path))}
        except OSError as error:
            raise ValueError(
                f"{error.filename} cannot be read ({error.strerror}), and auto_map in a configuration beside it "
                f"needs it for {path.stem}: save the model again, with its code."
            ) from error
    return files


def _modules(values: dict[str, Any], path: Path) -> Iterator[str]:
    """Names of the modules that a configuration's `auto_map` expects beside it, without those in another repo."""
    named = values.get("auto_map")
    for target in named.values() if isinstance(named, dict) else ():
        for text in target if isinstance(target, list) else [target]:
            if isinstance(text, str) and "--" not in text:
                module = text.split(".")[0]
                if not module.isidentifier():
                    raise ValueError(f"{path}: auto_map names {quoted(text)}, which is not a module beside it.")
                yield module


def _name_in_repo(path: Path, root: Path) -> str:
    """A file's name in the repo; raises `ValueError` unless it is in this directory and a repo accepts its name."""
    name = path.relative_to(root).as_posix()
    if not name.isprintable() or "\\" in name:
        raise ValueError(f"{root} has a file {name!a}, and a repo does not accept such a name: rename or remove it.")
    place = Path(os.path.realpath(path))  # this raises no error where links form a circle
    if not place.is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{path} leads out of {root}, to {place}: put a copy in its place, or remove the link.")
    if not path.is_file():
        raise ValueError(f"{path} has the name of a file that is pushed, but is not a file: remove it.")
    return name
