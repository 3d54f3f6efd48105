"""Small gated delta models on bytes of text and on associative recall, trained step by step.

Every batch follows from the seed and the number of the step, so that a training goes on where it was saved, and models
that were cut in different ways see the same data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_cuts import Batch, cut_text, read_tokens
from recall import IGNORED, recall_examples
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hf_compressm.families import find_layers


WARM_UP = 50
LARGEST_GRADIENT = 1.0
SEEDS_APART = 1_000_000
"""Batches of a seed, more than any training has steps."""
HELD_OUT = -1
"""The seed of held-out data."""
CALIBRATION = -2
START = {"initializer_range": 0.1}
STEP_SIZES = (1e-3, 1e-1)
"""Of the decay at the start, spread evenly in their logarithm as fla does: transformers' own forget within a token."""
OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True)
class Task:
    """What a model is trained on.

    Attributes:
        name: in tables.
        model: fields of the config.
        batch: training data by seed.
        held_out: batches of one size.
        rate: of AdamW, constant after a warm-up.
    """

    name: str
    model: dict[str, Any]
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
    return Task("text", {"vocab_size": 256}, batch, others, rate=3e-3)


def recall(
    keys: int = 48, values: int = 16, shown: int = 64, fewest: int = 4, rows: int = 8, held_out: int = 32
) -> Task:
    """Associative recall, see `recall.py`; all held-out sequences have all keys."""
    shape = {"keys": keys, "values": values, "shown": shown}

    def batch(seed: int, least: int = fewest) -> Batch:
        return recall_examples(rows, **shape, seed=seed, fewest=least)

    others = [batch(seed_of(HELD_OUT, number), keys) for number in range(held_out)]
    return Task("recall", {"vocab_size": keys + values}, batch, others, rate=3e-3)


def build(task: Task, channels: int, seed: int, hidden: int = 64) -> PreTrainedModel:
    """Two layers of Qwen3.5's gated delta net with so many channels in a key head, and no attention."""
    torch.manual_seed(seed)
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": hidden // 2}
    unused = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "linear_key_head_dim": channels}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Qwen3_5TextConfig(**heads, **unused, **layers, **sizes, **ends, **task.model, **START, use_cache=False)
    model = Qwen3_5ForCausalLM(config)
    for layer in find_layers(model):
        steps = torch.empty_like(layer.module.dt_bias).uniform_(*map(math.log, STEP_SIZES)).exp()
        layer.module.dt_bias.data = steps + torch.log(-torch.expm1(-steps))
    return model


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
        training = cls(task, seed, Qwen3_5ForCausalLM.from_pretrained(folder))
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

    def until(self, step: int) -> None:
        """Train until so many steps are done."""
        self.model.train()
        while self.step < step:
            for group in self.optimizer.param_groups:
                group["lr"] = self.task.rate * min(1.0, (self.step + 1) / WARM_UP)
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
