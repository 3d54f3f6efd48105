"""What a run costs: seconds of steps, of callbacks, of evaluation and of saving, kept over interruptions."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import peak_memory
from transformers import Trainer, TrainerCallback

from hf_compressm.families import find_layers
from hf_compressm.files.atomic import read_json, write_json


WARM_UP_STEPS = 2
"""The first steps of every state size pay for new buffers and are not in its mean."""
CLOCK_FILE = "clock.json"


@dataclass
class Phase:
    """Steps at the same state sizes, in order of the layers."""

    sizes: list[int]
    steps: int = 0
    seconds: float = 0.0
    warm_steps: int = 0
    warm_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more step."""
        self.steps += 1
        self.seconds += seconds
        if self.steps > WARM_UP_STEPS:
            self.warm_steps += 1
            self.warm_seconds += seconds

    @property
    def mean(self) -> float | None:
        """Seconds per step once warm; None where there were too few."""
        return self.warm_seconds / self.warm_steps if self.warm_steps else None


@dataclass
class Clock:
    """Seconds of one run.

    Attributes:
        phases: forward, backward and update, by state size.
        in_callbacks: between and around the steps: calibration, cuts, measurements of the ranking.
        evaluating: in `Trainer.evaluate`.
        saving: of checkpoints.
        total: from the first step's begin to the last one's end, evaluation and saving included.
        afterwards: of what an arm does once training is over, such as a cut.
        curve: at each evaluation the step, the seconds of training until then, and the metric.
        resumed: how often the run was interrupted.
    """

    phases: list[Phase] = field(default_factory=list)
    in_callbacks: float = 0.0
    evaluating: float = 0.0
    saving: float = 0.0
    total: float = 0.0
    afterwards: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    resumed: int = 0

    @property
    def training(self) -> float:
        """Seconds of training: steps, loading of batches, callbacks, and what an arm does afterwards."""
        return self.total - self.evaluating - self.saving + self.afterwards

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Count what happens inside under a name."""
        start = now()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + now() - start)

    def costs(self, batch_size: int, examples: int) -> dict[str, Any]:
        """Everything that a row of results says of costs.

        Args:
            batch_size: examples per step.
            examples: per epoch.
        """
        means = [phase.mean for phase in self.phases]
        first, last = (means[0], means[-1]) if means else (None, None)
        in_steps = sum(phase.seconds for phase in self.phases)
        return {
            "training_seconds": self.training,
            "evaluation_seconds": self.evaluating,
            "saving_seconds": self.saving,
            "callback_seconds": self.in_callbacks,
            "seconds_after_training": self.afterwards,
            "seconds_per_step": [first, last],
            "seconds_per_epoch": [mean and mean * examples / batch_size for mean in (first, last)],
            "examples_per_second": [mean and batch_size / mean for mean in (first, last)],
            "share_of_speed_bound": in_steps / self.training if self.training > 0 else None,
            "peak_memory_mib": peak(),
            "phases": [asdict(phase) for phase in self.phases],
            "interruptions": self.resumed,
        }

    def restore(self, folder: Path) -> None:
        """Go on from what `folder`, a checkpoint, kept; where a crash came before it was kept, from zero."""
        if (folder / CLOCK_FILE).exists():
            values = read_json(folder / CLOCK_FILE)
            values["phases"] = [Phase(**phase) for phase in values["phases"]]
            vars(self).update(values)
        self.resumed += 1


class Before(TrainerCallback):
    """The face of a clock in front of the other callbacks."""

    def __init__(self, clock: Clock) -> None:
        """Take the clock."""
        self.clock = clock
        self.reached = self.began = self.stepping = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint, and start."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step:
            self.clock.restore(checkpoint)
        self.reached = now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Callbacks come next."""
        self.began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is over."""
        end = now()
        sizes = [layer.state_size for layer in find_layers(kwargs["model"])]
        if not self.clock.phases or self.clock.phases[-1].sizes != sizes:
            self.clock.phases.append(Phase(sizes))
        self.clock.phases[-1].add(end - self.stepping)
        self.began = now()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.tick()

    def tick(self) -> None:
        """Bring the total up to date."""
        time_now = now()
        self.clock.total += time_now - self.reached
        self.reached = time_now


class After(TrainerCallback):
    """The face of a clock behind the other callbacks."""

    def __init__(self, before: Before) -> None:
        """Take the face in front."""
        self.before = before

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Callbacks are over, the step begins."""
        self.before.stepping = now()
        self.before.clock.in_callbacks += self.before.stepping - self.before.began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """So are those behind it. Nothing is saved at the end: the Trainer would go on from there by one step more."""
        self.before.clock.in_callbacks += now() - self.before.began
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the clock beside the checkpoint."""
        self.before.tick()
        write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / CLOCK_FILE, asdict(self.before.clock))


class TimedTrainer(Trainer):
    """A Trainer whose costs are counted.

    Args:
        clock: that counts.
        metric: of the clock's curve.
        callbacks: those between the clock's faces.
        **arguments: those of `Trainer`.
    """

    def __init__(self, *, clock: Clock, metric: str, callbacks: Any = (), **arguments: Any) -> None:
        self.clock, self.metric, self.before = clock, metric, Before(clock)
        super().__init__(callbacks=[self.before, *callbacks, After(self.before)], **arguments)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`, and a point of the curve; what is evaluated once training is over is not counted."""
        if not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        self.before.tick()
        seconds = self.clock.training
        with self.clock.aside("evaluating"):
            metrics = super().evaluate(*args, **kwargs)
        figure = metrics[f"eval_{self.metric}"]
        if math.isfinite(figure):
            self.clock.curve.append((self.state.global_step, seconds, figure))
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`."""
        with self.clock.aside("saving"):
            super()._save_checkpoint(*args, **kwargs)


def now() -> float:
    """Wall-clock seconds, once the accelerator has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak() -> float:
    """The most memory that the process has held, in MiB: of the GPU where there is one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_memory()
