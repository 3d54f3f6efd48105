"""Small models on bytes of text and on associative recall, trained step by step.

Every batch follows from the seed and the number of the step, so that a training goes on where it was saved, and models
that were cut in different ways see the same data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from compare_cuts import Batch, cut_text, read_tokens
from recall import IGNORED, recall_examples
from transformers import AutoModelForCausalLM, PreTrainedModel


WARM_UP = 50
LARGEST_GRADIENT = 1.0
SEEDS_APART = 1_000_000
"""Batches of a seed, more than any training has steps."""
HELD_OUT = -1
"""The seed of held-out data."""
CALIBRATION = -2
OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True)
class Task:
    """What a model is trained on.

    Attributes:
        name: in tables.
        vocab_size: number of tokens.
        batch: training data by seed.
        held_out: batches of one size.
        rate: of AdamW, constant after a warm-up.
    """

    name: str
    vocab_size: int
    batch: Callable[[int], Batch]
    held_out: list[Batch]
    rate: float


def seed_of(seed: int, number: int) -> int:
    """The seed of a batch."""
    return (seed + 10) * SEEDS_APART + number


def text(train_file: str | None = None, rows: int = 8, length: int = 128, held_out: int = 32) -> Task:
    """Bytes of a text file, or of Python's standard library; the last tenth is held out."""
    tokens = read_tokens(train_file)
    split = int(0.9 * len(tokens))

    def batch(seed: int, source: torch.Tensor = tokens[:split]) -> Batch:
        return cut_text(source, rows, length, torch.Generator().manual_seed(seed))

    others = [batch(seed_of(HELD_OUT, number), tokens[split:]) for number in range(held_out)]
    return Task("text", 256, batch, others, rate=3e-3)


def recall(
    keys: int = 48, values: int = 16, shown: int = 64, fewest: int = 4, rows: int = 8, held_out: int = 32
) -> Task:
    """Associative recall, see `recall.py`; all held-out sequences have all keys."""
    shape = {"keys": keys, "values": values, "shown": shown}

    def batch(seed: int, least: int = fewest) -> Batch:
        return recall_examples(rows, **shape, seed=seed, fewest=least)

    others = [batch(seed_of(HELD_OUT, number), keys) for number in range(held_out)]
    return Task("recall", keys + values, batch, others, rate=3e-3)


def warm_up(step: int) -> float:
    """The share of the rate that a step has: rising to all of it, and constant."""
    return min(1.0, (step + 1) / WARM_UP)


class Training:
    """A model with its optimizer.

    Args:
        task: its data.
        seed: of the data.
        model: to train.

    Attributes:
        step: steps done.
    """

    def __init__(self, task: Task, seed: int, model: PreTrainedModel) -> None:
        self.task, self.seed, self.model, self.step = task, seed, model, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), task.rate, weight_decay=0.0)

    @classmethod
    def load(cls, task: Task, seed: int, folder: Path) -> "Training":
        """Go on from what `save` has written."""
        training = cls(task, seed, AutoModelForCausalLM.from_pretrained(folder))
        saved = torch.load(folder / OPTIMIZER_FILE)
        training.optimizer.load_state_dict(saved["optimizer"])
        training.step = saved["step"]
        return training

    def save(self, folder: Path) -> None:
        """Write model, moments and number of steps; the file of the moments is there once all is."""
        self.model.save_pretrained(folder)
        partial = folder / f"{OPTIMIZER_FILE}.partial"
        torch.save({"optimizer": self.optimizer.state_dict(), "step": self.step}, partial)
        partial.replace(folder / OPTIMIZER_FILE)

    def until(self, step: int, shape: Callable[[int], float] = warm_up) -> None:
        """Train until so many steps are done, the rate times `shape` of the number of each step."""
        self.model.train()
        while self.step < step:
            for group in self.optimizer.param_groups:
                group["lr"] = self.task.rate * shape(self.step)
            loss = self.model(**self.task.batch(seed_of(self.seed, self.step))).loss
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
            self.optimizer.step()
            self.step += 1

    def calibration(self, batches: int) -> list[Batch]:
        """Training data that no step sees."""
        return [self.task.batch(seed_of(CALIBRATION, number)) for number in range(batches)]

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Held-out loss, and the share of scored tokens that are predicted."""
        self.model.eval()
        losses, hits, scored = 0.0, 0, 0
        for batch in self.task.held_out:
            outputs = self.model(**batch)
            labels = batch["labels"][:, 1:]
            right = (outputs.logits[:, :-1].argmax(dim=-1) == labels) & (labels != IGNORED)
            losses += outputs.loss.item()
            hits, scored = hits + int(right.sum()), scored + int((labels != IGNORED).sum())
        return {"loss": losses / len(self.task.held_out), "accuracy": hits / scored}
