"""Which files of a directory are the model: they go to the Hub, the state of a training run stays behind."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_compressm.bases import ADAPTER_CONFIG
from hf_compressm.checkpoints import ADAPTER_FILE, BASE_FOLDER, TRAINER_STATE_FILE, verify_files
from hf_compressm.durable import quoted, read_json
from hf_compressm.loading import verify_checkpoint
from hf_compressm.reporting.cards import CARD_FILE, FIGURES_FOLDER


CONFIG_FILE = "config.json"

_TEMPLATES_FOLDER = "additional_chat_templates"
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".spm", ".tiktoken", ".jinja")
"""Of configurations, of tokenizers and processors, and of the history."""
_IMAGE_SUFFIXES = (".png", ".svg", ".pdf")
_DOCUMENTS = (CARD_FILE, "LICENSE", "LICENSE.md", "NOTICE")
_NEVER = (TRAINER_STATE_FILE,)
_WEIGHTS = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|(pytorch|adapter)_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"
)


@dataclass(frozen=True)
class ChosenFile:
    """A file that goes to the Hub.

    Attributes:
        name: its path in the repo, with `/` between folders.
        path: where it is.
        bytes: its length.
    """

    name: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class Selection:
    """What of a directory goes to the Hub.

    Attributes:
        files: in the order of their names.
        left: names of files and folders that stay behind; those of folders end in `/`.
    """

    files: tuple[ChosenFile, ...]
    left: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """The files' names in the repo."""
        return {file.name for file in self.files}

    @property
    def bytes(self) -> int:
        """Length of all files together."""
        return sum(file.bytes for file in self.files)


def choose_files(directory: str | Path) -> Selection:
    """Make sure that a saved model or checkpoint is whole, and choose the files that make the model.

    These are weights, configurations, files of tokenizer and processor, the code that `auto_map` names with what it
    imports, README.md and licence, the history of cuts, the folder `compressm_figures`, and for a PEFT model all its
    adapters and its `base_model`. Optimizer, scheduler, generator states and the Trainer's own state are not, nor is
    the seal, which lists them.

    Args:
        directory: with `config.json` or `adapter_config.json`, and safetensors weights.

    Raises:
        ValueError: naming the file, if the directory is not whole, or one of its files cannot go to the Hub.
    """
    directory = Path(directory)
    _verify(directory)
    inside = _Folder(directory, directory)
    inside.take_model()
    return Selection(tuple(sorted(inside.files, key=lambda file: file.name)), tuple(sorted(inside.left)))


def stale_files(selection: Selection, present: set[str]) -> list[str]:
    """What an earlier push left in a repo, and a loader would take for a part of the model that is pushed now.

    Args:
        selection: what is pushed.
        present: names of the files in the repo.

    Returns:
        Weights and indices at the places of the new ones that are not among these; the whole base, if there is none.
    """
    has_base = any(name.startswith(f"{BASE_FOLDER}/") for name in selection.names)
    stale = []
    for name in sorted(present - selection.names):
        folder, _, last = name.rpartition("/")
        in_base = f"{folder}/".startswith(f"{BASE_FOLDER}/")
        if (in_base and not has_base) or (folder in ("", BASE_FOLDER) and _WEIGHTS.fullmatch(last)):
            stale.append(name)
    return stale


def _verify(directory: Path) -> None:
    """Raise `ValueError` unless a directory holds a whole model, or whole adapters."""
    if not directory.exists():
        raise ValueError(f"{directory} is not there.")
    verify_files(directory)
    found = [folder for folder in (directory, directory / BASE_FOLDER) if (folder / CONFIG_FILE).exists()]
    for folder in found:
        verify_checkpoint(folder)
    if directory not in found and not any(_adapter_folders(directory)):
        raise ValueError(
            f"{directory} has neither {CONFIG_FILE} nor {ADAPTER_CONFIG}: give a directory that save_pretrained or a "
            "Trainer wrote."
        )


def _adapter_folders(directory: Path) -> Iterator[Path]:
    """Where adapters are: `default` beside everything else, those with names in folders."""
    yield from (path.parent for path in (*directory.glob(ADAPTER_CONFIG), *directory.glob(f"*/{ADAPTER_CONFIG}")))


class _Folder:
    """The choice in the making: what is taken from a folder, and what is left."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.root = root
        self.files: list[ChosenFile] = []
        self.left: list[str] = []

    def take_model(self) -> None:
        """Take the files of a model or adapter, and go into the folders that belong to it."""
        wanted = self._weights() | self._code()
        for path in sorted(self.folder.iterdir()):
            hidden = path.name.startswith(".")
            if path.is_dir():
                self._take_folder(path)
            elif path.name in wanted or (_belongs(path.name) and not hidden):
                self._take(path)
            else:
                self._leave(path)

    def _take_folder(self, path: Path) -> None:
        inside = _Folder(path, self.root)
        if path.name == BASE_FOLDER and self.folder == self.root:
            inside.take_model()
        elif self.folder == self.root and path in _adapter_folders(self.root):
            inside.take_model()
        elif path.name == FIGURES_FOLDER and self.folder == self.root:
            inside.take_suffixes(_IMAGE_SUFFIXES)
        elif path.name == _TEMPLATES_FOLDER:
            inside.take_suffixes((".jinja",))
        else:
            self._leave(path, "/")
        self.files += inside.files
        self.left += inside.left

    def take_suffixes(self, suffixes: tuple[str, ...]) -> None:
        """Take the files of a folder that is not a model's by their suffix."""
        for path in sorted(self.folder.iterdir()):
            if path.suffix in suffixes and not path.name.startswith(".") and not path.is_dir():
                self._take(path)
            else:
                self._leave(path, "/" if path.is_dir() else "")

    def _weights(self) -> set[str]:
        """The adapters, and the file or shards that a loader reads; other weights are of an earlier save."""
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if (self.folder / SAFE_WEIGHTS_NAME).exists() or not index.exists():
            return {SAFE_WEIGHTS_NAME, ADAPTER_FILE}
        return {ADAPTER_FILE, index.name, *read_json(index)["weight_map"].values()}

    def _code(self) -> set[str]:
        """The modules that configurations name, and what these import from beside them."""
        configurations = sorted({*self.folder.glob(CONFIG_FILE), *self.folder.glob("[!.]*_config.json")})
        names = {name for path in configurations for name in _modules(read_json(path), path)}
        files = set()
        for path in (self.folder / f"{name}.py" for name in names):
            try:
                files |= {path.name, *(Path(other).name for other in get_relative_import_files(path))}
            except OSError as error:
                raise ValueError(
                    f"{error.filename} cannot be read ({error.strerror}), and auto_map in a configuration beside it "
                    f"needs it for {path.stem}: save the model again, with its code."
                ) from error
        return files

    def _take(self, path: Path) -> None:
        """Take a file, after making sure that it is one, of this directory, and has a name for a repo."""
        name = path.relative_to(self.root).as_posix()
        if not name.isprintable() or "\\" in name:
            raise ValueError(f"{self.root} has a file {name!a}, and a repo takes no such name: rename or remove it.")
        place, root = Path(os.path.realpath(path)), Path(os.path.realpath(self.root))
        if not place.is_relative_to(root):
            raise ValueError(
                f"{path} leads out of {self.root}, to {place}: put a copy in its place, or remove the link."
            )
        if not path.is_file():
            raise ValueError(f"{path} has the name of a file that is pushed, and is none: remove it.")
        self.files.append(ChosenFile(name, path, path.stat().st_size))

    def _leave(self, path: Path, ending: str = "") -> None:
        self.left.append(path.relative_to(self.root).as_posix() + ending)


def _belongs(name: str) -> bool:
    """Whether a file that is not of weights or code is taken for one of the model by its name."""
    if name in _DOCUMENTS:
        return True
    return name.endswith(_TEXT_SUFFIXES) and name not in _NEVER and not _WEIGHTS.fullmatch(name)


def _modules(values: dict[str, Any], path: Path) -> Iterator[str]:
    """Names of the modules that a configuration's `auto_map` puts beside it, not those in another repo."""
    named = values.get("auto_map")
    for target in named.values() if isinstance(named, dict) else ():
        for text in target if isinstance(target, list) else [target]:
            if isinstance(text, str) and "--" not in text:
                module = text.split(".")[0]
                if not module.isidentifier():
                    raise ValueError(f"{path}: auto_map names {quoted(text)}, which is no module beside it.")
                yield module
