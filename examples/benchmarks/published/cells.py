"""One cell of `published_table.py`: a model, cut in one way to one share, measured and trained on, row by row."""

import gc
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from measuring import machine, peak_memory
from published.arms import Arm
from published.checkpoint import DEVICE, Checkpoint
from published.measures import perplexity
from published.recovery import step_of
from published.tables import UNCUT
from published.texts import calibration, windows
from rows import key_of
from transformers import PreTrainedModel, set_seed

from hf_compressm import CompreSSMConfig
from hf_compressm.compression import count_state_bytes
from hf_compressm.families import find_layers


SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Cell:
    """A model, a way to cut it and a share; `arm` None is the model itself, trained on likewise.

    Attributes:
        checkpoint: the model.
        arm: the way to cut.
        share: of the states that go.
    """

    checkpoint: Checkpoint
    arm: Arm | None
    share: float

    @property
    def name(self) -> str:
        """Of the way, and how much goes."""
        return UNCUT if self.arm is None else f"{self.arm.name} {self.share:g}"

    @property
    def key(self) -> str:
        """Mark of all its rows."""
        return key_of(self.checkpoint.name, self.name, self.checkpoint.options.seed)

    @property
    def folder(self) -> Path:
        """Of the checkpoints of its recovery."""
        return self.checkpoint.options.output / "runs" / self.key

    def key_at(self, step: int) -> str:
        """Mark of a row."""
        return f"{self.key}-step{step}"

    def settings(self, step: int) -> dict[str, Any]:
        """What decides a row, beside model, share and step."""
        return {**self.checkpoint.options.settings(step), "arm": {} if self.arm is None else dict(self.arm.settings)}

    def missing(self) -> list[int]:
        """The steps of recovery whose rows are not there, 0 for right after the cut.

        Raises:
            ValueError: if a row was made with other settings.
        """
        options = self.checkpoint.options
        done, steps = options.results.read(), (0, *options.recovery.steps)
        rows = {step: done.get(self.key_at(step)) for step in steps}
        for step, row in rows.items():
            now = self.settings(step)
            other = [name for name in now if row is not None and row["settings"].get(name) != now[name]]
            if other:
                raise ValueError(
                    f"{self.key_at(step)} was run with other settings ({', '.join(other)}). Use another --output, or "
                    f"take its line out of {options.results.path}."
                )
        return [step for step, row in rows.items() if row is None]

    def run(self) -> Iterator[dict[str, Any]]:
        """Make the rows that are missing, one after the other."""
        options, missing = self.checkpoint.options, self.missing()
        if not missing:
            return
        set_seed(options.seed)
        self.clear(missing)
        model, cut = None, {}
        if missing[0] == 0 or options.recovery.checkpoint(self.folder, missing[0]) is None:
            model = self.checkpoint.load()
            cut = {} if self.arm is None else {"cut": self.cut(model)}
        for step in missing:
            started = time.perf_counter()
            if step:
                trained = self.recovered(model, step)
                model, cut = None, {}  # two models may not fit
                _release()
                model = self.checkpoint.load(trained)
            training = time.perf_counter() - started
            yield self.row(model, step) | cut | {"training_seconds": training}
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self, missing: Sequence[int]) -> None:
        """Empty the folder, unless this recovery with these settings was interrupted after the first row."""
        settings = json.dumps(self.settings(missing[-1]))
        path = self.folder / SETTINGS_FILE
        if missing[0] == 0 or not path.exists() or path.read_text(encoding="utf-8") != settings:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            path.write_text(settings, encoding="utf-8")

    def recovered(self, model: PreTrainedModel | None, step: int) -> Path:
        """A checkpoint after some steps of recovery.

        Args:
            model: as it was cut; it may be None where there is a checkpoint.
            step: to reach.
        """
        recovery = self.checkpoint.options.recovery
        last = recovery.checkpoint(self.folder, step)
        if last is not None and step_of(last) == step:
            return last
        if model is None:
            model = self.checkpoint.load(last)
        return recovery.train(model, self.folder, step, windows(self.checkpoint.train, self.checkpoint.options.length))

    def cut(self, model: PreTrainedModel) -> dict[str, Any]:
        """Cut a model, and tell what it took.

        Raises:
            ValueError: if a layer was not cut.
        """
        options, before = self.checkpoint.options, self.checkpoint.states
        size = max(1, round(before * (1 - self.share)))
        batches = calibration(
            self.checkpoint.train, options.samples, options.length, options.calibration_batch, options.seed
        )
        seed = {"sampling_seed": options.seed, "calibration_batches": len(batches)}
        config = CompreSSMConfig(target_state_size=size, **seed, **self.arm.settings)
        held = count_state_bytes(model)
        _release()
        start = time.perf_counter()
        self.arm.cut(model, config, batches)
        seconds, peak = time.perf_counter() - start, _peak_mib()
        reached = {layer.state_size for layer in find_layers(model)}
        if reached != {size}:
            raise ValueError(
                f"{self.name} was to leave {size} states in every layer of {self.checkpoint.name}: {reached}."
            )
        bytes_of_state = [held, count_state_bytes(model)]
        return {"seconds": seconds, "peak_mib": peak, "states": [before, size], "state_bytes": bytes_of_state}

    def row(self, model: PreTrainedModel, step: int) -> dict[str, Any]:
        """What is measured of a model."""
        options, started = self.checkpoint.options, time.perf_counter()
        return {
            "key": self.key_at(step),
            "model": self.checkpoint.name,
            "arm": UNCUT if self.arm is None else self.arm.name,
            "share": self.share,
            "step": step,
            "perplexity": perplexity(model, self.checkpoint.test, options.test_batch),
            "tasks": options.harness.figures(model, self.checkpoint.tokenizer),
            "measuring_seconds": time.perf_counter() - started,
            "parameters": model.num_parameters(),
            "settings": self.settings(step),
            "machine": machine(),
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _release() -> None:
    """Give back what no model needs any more, and count the peak of a GPU's memory from now."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> float:
    """The most memory: on a GPU what was allocated there, weights included; else of this process since it began."""
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else peak_memory()
