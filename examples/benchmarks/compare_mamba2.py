"""What does a cut of a trained Mamba-2 cost, ours and rivals'? Small stock models on bytes of text and on recall.

A trained model, or a hybrid (Bamba) on text, is cut by every arm to a half, a quarter and an eighth of its states:
held-out loss and accuracy right after it, the relative error of every layer's output and the change of the loss, each
beside the predicted one, and the seconds of the cut. Rows "trained on" go on after a cut to a quarter, at equal
wall-clock: a cut that took as long as k steps of the uncut model has 200 - k and 1,000 - k steps left, at a rate that
falls to 0 over the 1,000. Every row is written once it is done, and passed over by the next call.

    python examples/benchmarks/compare_mamba2.py --train_file book.txt --output DIR
    python examples/benchmarks/compare_mamba2.py --tasks recall --seeds 0 --only "refit*" --output DIR
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "comparison"))

from cut_arms import Arm, cut
from layer_errors import outputs_of_layers, relative_errors
from mamba2_tables import predictions, tables
from plots import draw_loss_changes
from rows import Results, key_of
from single_cuts import Bench, Row, command, run_rows
from small_models import hybrid, mamba2
from small_training import Task, Training, recall, text
from state_arms import ARMS, CALIBRATION_BATCHES


ERROR_BATCHES = 4
"""Held-out batches on which the errors of layers are measured."""
TIMED_STEPS = 5


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is.

    Attributes:
        states: before the cut.
        hidden: width of the model.
        layers: of Mamba-2.
        steps: of the training.
        length: of a row of text.
        more: the further steps after which a model is measured, for a cut that takes no time; ascending.
        cuts: what the states are divided by.
        trained_on: what they are divided by in rows that are trained on.
    """

    states: int
    hidden: int
    layers: int
    steps: int
    length: int
    more: tuple[int, ...]
    cuts: tuple[int, ...]
    trained_on: int


FULL = Scale(64, 64, layers=4, steps=2000, length=256, more=(200, 1000), cuts=(2, 4, 8), trained_on=4)
SMOKE = Scale(8, 32, layers=2, steps=10, length=32, more=(1, 3), cuts=(2, 4), trained_on=4)


@dataclass(frozen=True)
class Mamba2Bench(Bench):
    """One task with one seed.

    Attributes:
        scale: sizes.
        build: makes a model of so many states, so wide, for so many tokens, with so many layers.
    """

    scale: Scale
    build: Callable[[int, int, int, int], PreTrainedModel]

    def begin(self) -> Training:
        """A new model at its full size."""
        torch.manual_seed(self.seed)
        scale = self.scale
        model = self.build(scale.states, scale.hidden, self.task.vocab_size, scale.layers)
        return Training(self.task, self.seed, model)

    def rows(self) -> Iterator[Row]:
        """All rows, those that are not trained on first."""
        name = partial(key_of, self.task.name, seed=self.seed)
        yield Row(name("uncut"), "uncut", self.uncut)
        for arm in ARMS:
            for divisor in self.scale.cuts:
                label = f"{arm.name} to {self.scale.states // divisor}"
                run = partial(self.cut_trained, arm, self.scale.states // divisor)
                yield Row(name(label), label, run, arm)
        yield Row(name("uncut, trained on"), "uncut, trained on", self.uncut_trained_on)
        size = self.scale.states // self.scale.trained_on
        for arm in [arm for arm in ARMS if arm.further]:
            label = f"{arm.name} to {size}, trained on"
            yield Row(name(label), label, partial(self.cut_and_trained_on, arm, size), arm)

    def uncut(self) -> dict[str, Any]:
        """The trained model."""
        figures = self.trained(self.steps).figures()
        return {"arm": "uncut", "size": self.scale.states, "before": figures}

    def cut_trained(self, arm: Arm, size: int) -> dict[str, Any]:
        """Cut the trained model."""
        training = self.trained(self.steps)
        seen = outputs_of_layers(training.model, self.task.held_out[:ERROR_BATCHES])
        result = cut(training, arm, size, CALIBRATION_BATCHES)
        return {
            "arm": arm.name,
            "size": size,
            "seconds of the cut": result.seconds,
            "predicted loss change": result.plan.predicted_loss_change,
            "predicted": [layer.predicted_error for layer in result.plan.layers],
            "measured": relative_errors(training.model, seen),
            "after": training.figures(),
        }

    def uncut_trained_on(self) -> dict[str, Any]:
        """The trained model, after all further steps."""
        then = self.trained_on(self.trained(self.steps), 0)
        return {"arm": "uncut", "size": self.scale.states, "seconds of the cut": 0.0, "steps of the cut": 0} | then

    def cut_and_trained_on(self, arm: Arm, size: int) -> dict[str, Any]:
        """Cut the trained model, and train on for the rest of the time."""
        seconds_of_a_step = self.seconds_of_a_step()
        training = self.trained(self.steps)
        seconds = cut(training, arm, size, CALIBRATION_BATCHES).seconds
        taken = round(seconds / seconds_of_a_step)
        figures: dict[str, Any] = {"arm": arm.name, "size": size, "seconds of the cut": seconds}
        return figures | {"steps of the cut": taken} | self.trained_on(training, taken)

    def trained_on(self, training: Training, taken: int) -> dict[str, Any]:
        """Figures after each of the numbers of further steps, of which some are spent already."""
        end = self.scale.more[-1]
        start = training.step - taken

        def falling(step: int) -> float:
            return max(0.0, 1 - (step - start) / end)

        found = {}
        for more in self.scale.more:
            training.until(start + more, falling)
            found[str(more)] = training.figures()
        return {"trained on": found}

    def seconds_of_a_step(self) -> float:
        """Of the uncut model, the median of a few after a first one."""
        training, seconds = self.trained(self.steps), []
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            training.until(training.step + 1)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])


def benches(args: argparse.Namespace, models: Path) -> Iterator[Mamba2Bench]:
    """Every task with every seed."""
    scale = SMOKE if args.smoke else FULL
    small: dict[str, Any] = {"rows": 2, "held_out": 1} if args.smoke else {}
    seeds = args.seeds[:1] if args.smoke else args.seeds
    for name in args.tasks:
        task: Task = recall(**small) if name == "recall" else text(args.train_file, length=scale.length, **small)
        build = hybrid if name == "hybrid" else mamba2
        task = replace(task, name=name)
        yield from (Mamba2Bench(task, seed, models, scale.steps, scale, build) for seed in seeds)


def run(args: argparse.Namespace, output: Path) -> None:
    """Run the rows that are not done, print the tables, and draw the predicted changes of the loss."""
    found = run_rows(benches(args, args.models or output / "models"), args.only, Results(output))
    print(tables(found))
    points = predictions(found)
    if points:
        draw_loss_changes([(one.arm, one.predicted, one.measured) for one in points], output / "loss_changes.png")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    command(__doc__, ("text", "recall", "hybrid"), run, "runs/compare_mamba2", arguments)


if __name__ == "__main__":
    main()
