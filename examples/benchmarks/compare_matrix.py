"""What does a cut cost where the state is a matrix? Small gated delta nets on bytes of text and on associative recall.

A trained model is cut by every arm to a half and to a quarter of its channels of queries and keys: held-out loss (and
accuracy of recall) before the cut, right after it, and after more steps with the moments carried over; the relative
error of every layer's output, beside the predicted one. Cuts during training, and small models from the start, end
after as many steps as the uncut model. Every row is written once it is done, and passed over by the next call.

    python examples/benchmarks/compare_matrix.py --train_file book.txt --output DIR
    python examples/benchmarks/compare_matrix.py --tasks recall --seeds 0 --only "refit*" --output DIR
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "comparison"))

from cut_arms import Arm, cut
from delta_arms import ARMS, CALIBRATION_BATCHES
from delta_tables import tables
from layer_errors import outputs_of_layers, relative_errors
from rows import Results, key_of
from single_cuts import Bench, Row, command, run_rows
from small_models import delta_net
from small_training import Training, recall, text


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is.

    Attributes:
        channels: of a key head before the cut.
        hidden: width of the model.
        steps: of the training, by task.
        more: steps after a cut of a trained model.
        cuts: what the channels are divided by.
        shares: of the training, after which it is cut; to the smallest of these sizes.
    """

    channels: int
    hidden: int
    steps: dict[str, int]
    more: int
    cuts: tuple[int, ...] = (2, 4)
    shares: tuple[float, ...] = (0.1, 0.25, 0.5)


FULL = Scale(channels=32, hidden=64, steps={"text": 1000, "recall": 1000}, more=200)
SMOKE = Scale(channels=8, hidden=16, steps={"text": 10, "recall": 10}, more=2, cuts=(4,), shares=(0.5,))


@dataclass(frozen=True)
class Matrix(Bench):
    """One task with one seed.

    Attributes:
        scale: sizes.
    """

    scale: Scale

    @property
    def marks(self) -> list[int]:
        """The steps after which the model is cut."""
        return sorted({round(share * self.steps) for share in self.scale.shares} | {self.steps})

    def begin(self, channels: int | None = None) -> Training:
        """A new model, at its full size by default."""
        torch.manual_seed(self.seed)
        model = delta_net(channels or self.scale.channels, self.scale.hidden, self.task.vocab_size)
        return Training(self.task, self.seed, model)

    def rows(self) -> Iterator[Row]:
        """All rows, those of trained models first."""
        sizes = [self.scale.channels // divisor for divisor in self.scale.cuts]
        name = partial(key_of, self.task.name, seed=self.seed)
        yield Row(name("uncut"), "uncut", self.uncut)
        for arm in ARMS:
            for size in sizes:
                label = f"{arm.name} to {size}"
                yield Row(name(label), label, partial(self.cut_trained, arm, size), arm)
        size = min(sizes)
        label = f"small from the start, {size}"
        yield Row(name(label), label, partial(self.small, size))
        for arm in [arm for arm in ARMS if arm.further]:
            for share in self.scale.shares:
                label = f"{arm.name} to {size} at {share:g} of training"
                yield Row(name(label), label, partial(self.cut_during, arm, size, share), arm)

    def uncut(self) -> dict[str, Any]:
        """The trained model, and what more steps make of it."""
        training = self.trained(self.steps)
        before = training.figures()
        training.until(self.steps + self.scale.more)
        return {"arm": "uncut", "size": self.scale.channels, "before": before, "then": training.figures()}

    def cut_trained(self, arm: Arm, size: int) -> dict[str, Any]:
        """Cut the trained model, and train on."""
        training = self.trained(self.steps)
        seen = outputs_of_layers(training.model, self.task.held_out[:CALIBRATION_BATCHES])
        result = cut(training, arm, size, CALIBRATION_BATCHES)
        figures: dict[str, Any] = {"arm": arm.name, "size": size, "seconds of the cut": result.seconds}
        figures["predicted"] = [layer.predicted_error for layer in result.plan.layers]
        figures["measured"] = relative_errors(training.model, seen)
        figures["after"] = training.figures()
        training.until(self.steps + self.scale.more)
        return figures | {"then": training.figures()}

    def cut_during(self, arm: Arm, size: int, share: float) -> dict[str, Any]:
        """Cut after a share of the training, and train to its end."""
        training = self.trained(round(share * self.steps))
        cut(training, arm, size, CALIBRATION_BATCHES)
        training.until(self.steps)
        return {"arm": arm.name, "size": size, "share": share, "end": training.figures()}

    def small(self, size: int) -> dict[str, Any]:
        """A small model from the start."""
        training = self.begin(size)
        training.until(self.steps)
        return {"arm": "small from the start", "size": size, "share": 0.0, "end": training.figures()}


def benches(args: argparse.Namespace, models: Path) -> Iterator[Matrix]:
    """Every task with every seed."""
    scale = SMOKE if args.smoke else FULL
    small: dict[str, Any] = {"rows": 2, "held_out": 1} if args.smoke else {}
    seeds = args.seeds[:1] if args.smoke else args.seeds
    makers = {"text": partial(text, args.train_file, **small), "recall": partial(recall, **small)}
    for name in args.tasks:
        task = makers[name]()
        yield from (Matrix(task, seed, models, scale.steps[name], scale) for seed in seeds)


def run(args: argparse.Namespace, output: Path) -> None:
    """Run the rows that are not done, and print the tables."""
    print(tables(run_rows(benches(args, args.models or output / "models"), args.only, Results(output))))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    command(__doc__, ("text", "recall"), run, "runs/compare_matrix", arguments)


if __name__ == "__main__":
    main()
