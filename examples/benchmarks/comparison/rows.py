"""Rows of the comparison: read from a YAML file, and written one by one as lines of JSON."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml


SECTIONS = ("task", "model", "training", "rows")
ROW_FIELDS = ("name", "arm", "group", "seeds", "size_of", "after", "training")
RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Row:
    """One run of one arm.

    Attributes:
        study: name of the settings file that it stands in.
        name: the same for all seeds.
        arm: one of `arms.ARMS`.
        group: the arm as which it is drawn, by default its own.
        seed: of the model's start and of the order of the data.
        size_of: row of the same seed whose state sizes this one takes.
        after: row of the same seed whose model this one starts from, or learns from.
        options: of the arm.
        training: fields of `TrainingArguments` in which the row differs from its study.
    """

    study: str
    name: str
    arm: str
    group: str
    seed: int
    size_of: str | None = None
    after: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of its folder, and mark of its line."""
        return key_of(self.study, self.name, self.seed)


@dataclass(frozen=True)
class Study:
    """The rows that share data, model and training settings.

    Attributes:
        name: of the settings file.
        task: `kind` and arguments of the task.
        model: `type` of the model and fields of its config.
        training: fields of `TrainingArguments`.
        rows: in the order in which they run.
    """

    name: str
    task: Mapping[str, Any]
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    rows: Sequence[Row]


def key_of(study: str, name: str, seed: int) -> str:
    """A file name for a row."""
    return re.sub(r"[^\w.=-]+", "_", f"{study}-{name}-seed{seed}")


def read_study(path: Path, smoke: bool = False, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a settings file; under `smoke` what its section of that name says takes the place of the rest.

    Args:
        path: YAML with the sections `task`, `model`, `training` and `rows`.
        smoke: whether to run small.
        overrides: of the section `task`, from the command line; those that the kind of task does not name are left
            out.

    Raises:
        ValueError: naming the file, for a missing section or a row that cannot be read.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    missing = [name for name in SECTIONS if not isinstance(values, dict) or name not in values]
    if missing:
        raise ValueError(f"{path} lacks the section(s) {', '.join(missing)}.")
    small = values.get("smoke", {}) if smoke else {}
    task, model, training = ({**values[name], **small.get(name, {})} for name in SECTIONS[:3])
    task |= {name: value for name, value in (overrides or {}).items() if name in values["task"]}
    rows: list[Row] = []
    for entry in values["rows"]:
        rows += _rows_of(path, {**copy.deepcopy(entry), **({"seeds": [0]} if smoke else {})})
    wanted = small.get("rows", [row.name for row in rows])
    rows = [row for row in rows if row.name in wanted]
    names = {row.name for row in rows}
    for row in rows:
        for needed in (row.size_of, row.after):
            if needed is not None and needed not in names:
                raise ValueError(f"{path}: the row {row.name!r} needs the row {needed!r}, which is not there.")
    return Study(path.stem, task, model, training, rows)


def _rows_of(path: Path, entry: Mapping[str, Any]) -> list[Row]:
    """One row for each seed."""
    absent = [name for name in ("name", "arm", "seeds") if name not in entry]
    if absent:
        raise ValueError(f"{path}: the row {dict(entry)} lacks {', '.join(absent)}.")
    options = {name: value for name, value in entry.items() if name not in ROW_FIELDS}
    shared: dict[str, Any] = {name: entry.get(name) for name in ("size_of", "after")}
    name, arm = str(entry["name"]), entry["arm"]
    shared |= {"group": entry.get("group", arm), "training": entry.get("training", {})}
    return [Row(path.stem, name, arm, seed=seed, **shared, options=options) for seed in entry["seeds"]]


class Results:
    """Finished rows, one line of JSON each; a line that a crash cut short does not count.

    Args:
        folder: of the output.
        name: of the file in it.
    """

    def __init__(self, folder: Path, name: str = RESULTS_FILE) -> None:
        self.path = folder / name
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, dict[str, Any]]:
        """By key, the last line of every row."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        found = {}
        for line in lines:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[values["key"]] = values
        return found

    def of(self, studies: Sequence[Study]) -> list[dict[str, Any]]:
        """Rows of these studies that are done, in the order of the settings, which also say how they are drawn."""
        done = self.read()
        rows = [row for study in studies for row in study.rows if row.key in done]
        return [{**done[row.key], "group": row.group} for row in rows]

    def add(self, values: Mapping[str, Any]) -> None:
        """Append a line, and see to it that it is on the disk; several processes may do so."""
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        line = ("\n" if torn else "") + json.dumps(values) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def chosen(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[Row]:
    """Rows whose key or name matches a pattern, or all."""
    if not patterns:
        return list(rows)
    return [row for row in rows if any(fnmatch(text, p) for text in (row.key, row.name) for p in patterns)]


def check_same(study: Study, row: Row, values: Mapping[str, Any] | None) -> None:
    """A row that is done was run with the settings of now.

    Args:
        study: whose row it is.
        row: as the settings have it.
        values: its line, or None if it is not done.

    Raises:
        ValueError: naming what differs.
    """
    wanted = {"training": {**study.training, **row.training}, "model": study.model, "options": row.options}
    wanted = json.loads(json.dumps(wanted, default=dict))
    differing = [name for name, value in wanted.items() if values is not None and values[name] != value]
    if differing:
        raise ValueError(
            f"{row.key} was run with other settings ({', '.join(differing)}). Use another --output, or take its line "
            f"out of {RESULTS_FILE} and its folder out of runs/."
        )
