"""What the example scripts share: reading arguments and data, measurements around the cuts, tables."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import psutil
import torch
import torch.distributed as dist
import yaml
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, find_last_complete_checkpoint
from hf_compressm.reports import write_report
from hf_compressm.reports.traces import AFTER_CUT, BEFORE_CUT


try:
    import resource
except ImportError:  # Windows
    resource = None

WARM_UP_STEPS = 2  # the first steps of a phase pay for new buffers and are not timed
MAX_LAYER_ROWS = 8


@dataclass
class RunArguments:
    """Whether the run is compressed, and how far it goes."""

    compress: bool = field(
        default=True, metadata={"help": "Cut while training; false if an engine such as FSDP holds the parameters."}
    )
    stop_after: int | None = field(
        default=None,
        metadata={"help": "Save a checkpoint after this step and stop, as if interrupted."},
    )


def parse_arguments(kinds: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read flags, or a single YAML or JSON file, into dataclasses.

    Args:
        kinds: the dataclasses.
        arguments: of the command line; by default those of this process.

    Raises:
        ValueError: for a file that is missing, is not a mapping, or holds a key that no dataclass knows.
    """
    parser = HfArgumentParser(tuple(kinds))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) != 1 or not arguments[0].endswith((".yaml", ".yml", ".json")):
        return parser.parse_args_into_dataclasses(arguments)
    path = Path(arguments[0])
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML or JSON: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings as `name: value`, got {type(values).__name__}.")
    known = {field.name for kind in kinds for field in fields(kind) if field.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path} has unknown setting(s) {', '.join(map(str, unknown))}; --help lists all of them.")
    return parser.parse_dict(values)


def run(main: Callable[[], Any]) -> None:
    """Call a script's main function; a user's mistake ends it with one line and exit code 2."""
    try:
        main()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # its threads may otherwise abort the interpreter at its end
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their references; `evaluate.load("accuracy")` without a download."""

    def _info(self) -> evaluate.MetricInfo:
        """Describe the metric."""
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of predictions that equal their references.",
            citation="",
            inputs_description="predictions, references: integers",
            features=datasets.Features({"predictions": integer, "references": integer}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        """Compare."""
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class StopAfter(TrainerCallback):
    """A callback that saves and stops after a step; schedules stay those of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        """Stop, if it is that step."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Checkup(TrainerCallback):
    """A callback that evaluates before or after every cut, depending on its place in the list of callbacks."""

    def __init__(self, prefix: str, compressm: CompreSSMCallback) -> None:
        self.prefix = prefix
        self.compressm = compressm
        self.trainer: Trainer | None = None
        self.metrics: dict[int, dict[str, float]] = {}  # by step

    def on_step_begin(self, args, state, control, **kwargs):
        """Evaluate, outside the timed part of the step."""
        step = state.global_step
        if self.compressm.cut_follows(step) or any(event.step == step for event in self.compressm.events):
            metrics = self.trainer.evaluate(metric_key_prefix=self.prefix)
            self.metrics[state.global_step] = {k.removeprefix(f"{self.prefix}_"): v for k, v in metrics.items()}


class StepTimer(TrainerCallback):
    """A callback that times training steps: forward, backward and update, not cuts, evaluation, saving and loading.

    It belongs after all other callbacks, so that its clock starts when a cut is done.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # by the number of steps done before
        self._start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start = _synchronised_time()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock."""
        self.seconds[state.global_step - 1] = _synchronised_time() - self._start

    def between(self, start: int, end: int) -> list[float]:
        """Seconds of each of the steps `start` to `end - 1`, without the first few."""
        return [seconds for step, seconds in self.seconds.items() if start + WARM_UP_STEPS <= step < end]


class Experiment:
    """A Trainer with `CompreSSMCallback` and everything that is measured around it.

    Args:
        tokens_per_example: for the throughput.
        settings: of the callback.
        run: whether there is a callback, and whether the run stops early.
        **trainer_arguments: those of `Trainer`.
    """

    def __init__(
        self, tokens_per_example: int, settings: CompreSSMConfig, run: RunArguments, **trainer_arguments: Any
    ) -> None:
        self.tokens_per_example = tokens_per_example
        self.compressm = CompreSSMCallback(settings)
        self.before, self.after = Checkup(BEFORE_CUT, self.compressm), Checkup(AFTER_CUT, self.compressm)
        self.timer = StepTimer()
        callbacks = [self.before, self.compressm, self.after] if run.compress else []
        callbacks += [self.timer] if run.stop_after is None else [self.timer, StopAfter(run.stop_after)]
        self.trainer = Trainer(callbacks=callbacks, **trainer_arguments)
        self.before.trainer = self.after.trainer = self.trainer
        self.final: dict[str, float] = {}

    def train_and_report(self) -> PreTrainedModel:
        """Train, evaluate, save into `output_dir` with model card and report, and print the tables."""
        trainer = self.trainer
        args = trainer.args
        checkpoint = args.resume_from_checkpoint
        trainer.train(find_last_complete_checkpoint(args.output_dir) if checkpoint == "last" else checkpoint)
        metrics = trainer.evaluate()
        self.final = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        trainer.save_model(args.output_dir)  # with model card, history and pictures
        if trainer.is_world_process_zero():
            self._print_cuts()
            self._print_summary()
            self._report(Path(args.output_dir))
        return trainer.model

    def _print_cuts(self) -> None:
        rows = [("after step", "outcome", "mean state size", "loss before", "loss after", "seconds")]
        for event in self.compressm.events:
            before, after = event.result.state_sizes_before.values(), event.result.state_sizes_after.values()
            sizes = f"{statistics.mean(before):.1f} -> {statistics.mean(after):.1f}"
            losses = [self._at(checkup, event.step, "loss") for checkup in (self.before, self.after)]
            rows.append((str(event.step), event.outcome, sizes, *losses, f"{event.result.seconds:.2f}"))
        if len(rows) > 1:
            print(f"\n{table(rows)}")

    def _at(self, checkup: Checkup, step: int, name: str) -> str:
        """A metric around a cut; a dash if the cut was made before this run was resumed."""
        value = checkup.metrics.get(step, {}).get(name)
        return "-" if value is None else f"{value:.4f}"

    def _print_summary(self) -> None:
        events = [event for event in self.compressm.events if event.outcome != "undone"]
        steps = self.trainer.state.global_step
        if not events:
            print("\nNo cut was made, so there is nothing to compare.")
            return
        first, last = events[0], events[-1]
        rows = [("", f"before the first cut (step {first.step})", f"at the end (step {steps})")]
        rows += _size_rows(first.result.state_sizes_before, last.result.state_sizes_after)
        rows.append(("parameters", f"{first.result.parameters_before:,}", f"{last.result.parameters_after:,}"))
        for name in ("loss", "accuracy"):
            if name in self.final:
                rows.append((f"validation {name}", self._at(self.before, first.step, name), f"{self.final[name]:.4f}"))
        rows += self._speed_rows(self.timer.between(0, first.step), self.timer.between(last.step, steps))
        print(f"\n{table(rows)}\n\nPeak memory of the whole run: {_peak_memory()}.")

    def _speed_rows(self, *phases: list[float]) -> list[tuple[str, ...]]:
        args = self.trainer.args
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seconds_per_step = [statistics.median(phase) if phase else math.nan for phase in phases]
        steps_per_epoch = len(self.trainer.train_dataset) / examples
        rows = (
            ("training tokens per second", ",.0f", lambda seconds: examples * self.tokens_per_example / seconds),
            ("milliseconds per step (median)", ".1f", lambda seconds: 1000 * seconds),
            ("seconds per epoch (training only)", ".2f", lambda seconds: steps_per_epoch * seconds),
        )
        timed = ("timed steps", *(str(len(phase)) for phase in phases))
        return [timed] + [
            (name, *("too few steps" if math.isnan(s) else format(value(s), digits) for s in seconds_per_step))
            for name, digits, value in rows
        ]

    def _report(self, folder: Path) -> None:
        if self.compressm.events:
            page = write_report(folder)
            print(f"Report: {page}; model card: {folder / 'README.md'}")


def load_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """Load with `auto_class.from_pretrained`; the error for a directory or Hub id that cannot be loaded is one line.

    Raises:
        ValueError: if there is nothing to load.
    """
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name!r} is neither a local model directory nor a model that can be loaded from the Hub: {reason}"
        ) from error


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right; a rule under the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    first, *others = widths
    lines = [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _size_rows(before: dict[str, int], after: dict[str, int]) -> list[tuple[str, ...]]:
    """One row per layer, or a range where there are many."""
    if len(before) <= MAX_LAYER_ROWS:
        return [(f"state size of {name}", str(size), str(after[name])) for name, size in before.items()]
    ranges = [f"{min(sizes.values())} to {max(sizes.values())}" for sizes in (before, after)]
    return [(f"state size of {len(before)} layers", *ranges)]


def _synchronised_time() -> float:
    """Wall-clock seconds, after the accelerator has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _peak_memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB of GPU memory"
    if resource is None:
        return f"{psutil.Process().memory_info().peak_wset / 2**20:,.0f} MiB"
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return f"{kibibytes / 1024:,.0f} MiB (resident set of the process)"
