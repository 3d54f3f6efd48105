"""The traces that a run leaves on the disk: the history of its cuts, the Trainer's log, the model's configuration."""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_compressm.checkpoints import find_last_complete_checkpoint
from hf_compressm.compression import check_record
from hf_compressm.compression.history import CALLBACK, CutEvent, from_record, read_history
from hf_compressm.compression.log import PACE
from hf_compressm.config import CompreSSMConfig
from hf_compressm.files.atomic import read_json
from hf_compressm.files.names import BASE_FOLDER, CONFIG_FILE, HISTORY_FILE, TRAINER_STATE_FILE
from hf_compressm.utils.checks import LONGEST_NAME, is_count, is_number


BEFORE_CUT, AFTER_CUT = "before_cut", "after_cut"
"""Prefixes of metrics from evaluations at a cut's own step, such as those of the examples."""
_NO_METRIC = re.compile(r"(runtime|per_second|preparation_time|mem_\w+)$")


@dataclass(frozen=True, eq=False)
class Run:
    """What is known about a run.

    Attributes:
        name: of its directory.
        events: attempts to cut, oldest first; empty where only the saved model records the cuts.
        log: the Trainer's log, each entry with its `step`; finite numbers only.
        config: of the model; empty if there is none.
        settings: of the callback; empty if they are not known.
        steps: optimizer steps done when the log was written.
        machine: the machine that it ran on, in words; empty if not known.
        model_step: the step of the model that is there, if the run went on after it and then loaded its best model.
    """

    name: str
    events: tuple[CutEvent, ...] = ()
    log: tuple[dict[str, float], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    machine: str = ""
    model_step: int | None = None

    def of_the_model(self) -> "Run":
        """The part of the run that made the model that is there: up to its step, with the cuts before it."""
        step = self.model_step
        if step is None:
            return self
        events = tuple(event for event in self.events if event.step < step)
        log = tuple(entry for entry in self.log if entry["step"] <= step)
        return replace(self, events=events, log=log, steps=step)

    @property
    def cuts(self) -> list[CutEvent]:
        """The attempts that changed the model, and the rollbacks."""
        return [event for event in self.events if event.outcome in ("cut", "rolled back")]

    @property
    def record(self) -> Mapping[str, Any]:
        """The record of cuts in the model's configuration; empty without one."""
        return self.config.get("compressm") or {}

    @property
    def model_class(self) -> str:
        """Name of the model's class."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "model"

    def series(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of an entry of the log."""
        return [(int(entry["step"]), entry[name]) for entry in self.log if name in entry]

    def metrics(self) -> list[str]:
        """Names of the evaluated metrics, without `eval_`, the loss first."""
        names = {key[5:] for entry in self.log for key in entry if key.startswith("eval_")}
        return sorted((name for name in names if not _NO_METRIC.search(name)), key=lambda name: (name != "loss", name))

    def before(self, event: CutEvent, metric: str) -> tuple[int, float] | None:
        """Step and value of the last evaluation before a cut."""
        own = [point for point in self.series(f"{BEFORE_CUT}_{metric}") if point[0] == event.step]
        earlier = own or [point for point in self.series(f"eval_{metric}") if point[0] <= event.step]
        return earlier[-1] if earlier else None

    def after(self, event: CutEvent, metric: str) -> tuple[int, float] | None:
        """Step and value of the first evaluation after a cut."""
        own = [point for point in self.series(f"{AFTER_CUT}_{metric}") if point[0] == event.step]
        later = own or [point for point in self.series(f"eval_{metric}") if point[0] > event.step]
        return later[0] if later else None

    def paces(self) -> tuple[float | None, float | None]:
        """Median steps per second up to the first cut, and after the last one; None where nothing was logged."""
        points, cuts = self.series(PACE), [event.step for event in self.cuts]
        if not cuts:
            return None, None
        phases = [[v for step, v in points if step <= cuts[0]], [v for step, v in points if step > cuts[-1]]]
        before, after = (statistics.median(phase) if phase else None for phase in phases)
        return before, after


def read_run(directory: str | Path) -> Run:
    """Read what a run, a checkpoint or a saved model left in its directory.

    An unfinished run is read from its last complete checkpoint.

    Args:
        directory: `output_dir` of a run, a checkpoint, or a saved model that was cut.

    Raises:
        ValueError: if nothing in it records a cut, or the record cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory. Give the output_dir of a run, or a saved model.")
    source = directory
    if not any((directory / name).exists() for name in (HISTORY_FILE, CONFIG_FILE, BASE_FOLDER)):
        source = Path(find_last_complete_checkpoint(directory) or directory)
    run = find_run(source)
    if run is None:
        raise ValueError(
            f"{directory} has no record of a cut: no {HISTORY_FILE}, no complete checkpoint with one, and no model "
            "that was cut. A run with CompreSSMCallback writes its history at its end and beside every checkpoint."
        )
    return replace(run, name=directory.resolve().name)


def find_run(directory: Path) -> Run | None:
    """The run that the files of one directory describe; None if they record no cut.

    Raises:
        ValueError: naming the file that cannot be read.
    """
    state = _read_if_there(directory / TRAINER_STATE_FILE)
    config = _read_if_there(directory / CONFIG_FILE) or _read_if_there(directory / BASE_FOLDER / CONFIG_FILE)
    check_record(config.get("compressm"))
    history = read_history(directory, state)
    events = _events(directory / HISTORY_FILE, history)
    ran_on, model_step = history.get("machine"), history.get("model_step")
    if not events and not config.get("compressm"):
        return None
    steps: Any = state.get("global_step")
    last = max((event.step for event in events), default=0)
    return Run(
        name=directory.resolve().name,
        events=tuple(events),
        log=tuple(finite_entries(state.get("log_history"))),
        config=config,
        settings=_settings(state),
        steps=max(steps if is_count(steps) else 0, last),
        machine=ran_on if isinstance(ran_on, str) and len(ran_on) <= LONGEST_NAME else "",
        model_step=model_step if is_count(model_step) else None,
    )


def _events(path: Path, history: dict[str, Any]) -> list[CutEvent]:
    """The attempts of a history; none without one."""
    if not history:
        return []
    try:
        return from_record(history)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def finite_entries(history: Any) -> list[dict[str, float]]:
    """The log's entries with a step, without values that are not finite numbers."""
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    return [
        {name: value for name, value in entry.items() if is_number(value)}
        for entry in entries
        if is_count(entry.get("step"))
    ]


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """The callback's settings that this version knows; a checkpoint keeps them with the states of all callbacks."""
    found: Any = state
    for name in ("stateful_callbacks", CALLBACK, "args", "config"):
        found = found.get(name) if isinstance(found, Mapping) else None
    known = [item.name for item in fields(CompreSSMConfig)]
    return {name: found[name] for name in known if name in found} if isinstance(found, Mapping) else {}
