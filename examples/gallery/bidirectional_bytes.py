"""Which module of Python's library are 128 bytes from? A block that reads them both ways, cut while it learns.

    python examples/gallery/bidirectional_bytes.py [--steps 300]

The block is an ordinary `nn.Module` with two selective scans, and is declared. The same model is trained twice: with
and without the callback.
"""

import argparse
import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, Layout, declare_layer, rows, states
from hf_compressm.scans import selective_scan


MODULES = ("_pydecimal", "argparse", "inspect", "tarfile", "typing")
LENGTH, WIDTH, STATES, RANK, BATCH = 128, 32, 64, 4, 16


class TwoWays(nn.Module):
    """Convolution, projection and scan in both directions, summed, gated and projected; `(batch, length, width)`."""

    def __init__(self, width: int, d_state: int) -> None:
        super().__init__()
        self.d_state, inner = d_state, 2 * width
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        for way in ("forth", "back"):
            parts = {
                "conv": nn.Conv1d(inner, inner, 3, groups=inner, padding="same"),
                "x_proj": nn.Linear(inner, RANK + 2 * d_state),
                "dt_proj": nn.Linear(RANK, inner),
            }
            setattr(self, way, nn.ModuleDict(parts))
            decay = torch.arange(1.0, d_state + 1).log().repeat(inner, 1)
            self.register_parameter(f"A_log_{way}", nn.Parameter(decay))

    def forward(self, hidden: Tensor) -> Tensor:
        """Both directions, each with parameters of its own."""
        u, gate = self.in_proj(hidden).mT.chunk(2, dim=1)
        forth = self.scanned(u, self.forth, self.A_log_forth)
        back = self.scanned(u.flip(-1), self.back, self.A_log_back).flip(-1)
        return self.out_proj(((forth + back) * F.silu(gate)).mT)

    def scanned(self, u: Tensor, parts: Any, A_log: Tensor) -> Tensor:
        """One direction, `(batch, channels, length)`."""
        u = F.silu(parts["conv"](u))
        step, B, C = parts["x_proj"](u.mT).split([RANK, self.d_state, self.d_state], dim=-1)
        y = selective_scan(u, parts["dt_proj"](step).mT, -A_log.exp(), B.mT, C.mT, delta_softplus=True)
        assert isinstance(y, Tensor)
        return y


declare_layer(
    TwoWays,
    Layout(
        state_size="d_state",
        parts=(
            states("A_log_forth"),
            rows("forth.x_proj", "*", "B", "C", folds=True),
            states("A_log_back", group=1),
            rows("back.x_proj", "*", "B", "C", folds=True, group=1),
        ),
    ),
    example=(TwoWays(8, d_state=4), torch.randn(2, 9, 8)),
)


class Classifier(nn.Module):
    """Bytes, two blocks, and the mean over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(256, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(TwoWays(WIDTH, STATES) for _ in range(2))
        self.head = nn.Linear(WIDTH, len(MODULES))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        hidden = self.embeddings(input_ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden = hidden + block(norm(hidden))
        logits = self.head(hidden.mean(dim=1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Pace(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.start)


def pieces() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Pieces of source files; every fifth one is for testing."""
    found = []
    for label, name in enumerate(MODULES):
        text = Path(str(importlib.import_module(name).__file__)).read_bytes()
        tokens = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
        found += [{"input_ids": row, "labels": torch.tensor(label)} for row in tokens]
    return [row for i, row in enumerate(found) if i % 5], found[::5]


def train(steps: int, callbacks: list[TrainerCallback]) -> tuple[Classifier, float, list[float]]:
    """Train a model; it, its test accuracy, and the seconds of every step."""
    torch.manual_seed(0)
    model, pace, (training, testing) = Classifier(), Pace(), pieces()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=100,
        )
        trainer = Trainer(model, args, train_dataset=training, callbacks=[pace, *callbacks])
        trainer.train()
        logits = torch.as_tensor(trainer.predict(testing).predictions)
    labels = torch.stack([row["labels"] for row in testing])
    return model, float((logits.argmax(-1) == labels).float().mean()), pace.seconds


def main() -> None:
    """Train with and without cuts, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    callback = CompreSSMCallback(CompreSSMConfig(target_state_size=8, end=0.1, num_cuts=1))
    _, full_accuracy, full = train(steps, [])
    model, accuracy, cut = train(steps, [callback])
    for event in callback.events:
        print(f"after step {event.step}: {event.result.state_sizes_before} -> {event.result.state_sizes_after}")
    late, last = sorted(cut[steps // 2 :]), sorted(full[steps // 2 :])
    print(f"uncut:  {STATES} states per channel, accuracy {full_accuracy:.3f}, {sum(full):.0f} s")
    print(f"cut:    {model.blocks[0].d_state} states per channel, accuracy {accuracy:.3f}, {sum(cut):.0f} s")
    print(f"a step: {last[len(last) // 2] / late[len(late) // 2]:.2f} times as fast after the cuts")


if __name__ == "__main__":
    main()
