"""How much does a cut hurt, by the way the states are ranked? Held-out loss right after it, nothing trained since.

One model is trained briefly, then copies of it are cut to several sizes by every criterion.

    python examples/benchmarks/compare_cuts.py --task random              # no training: random LRUs
    python examples/benchmarks/compare_cuts.py --task images --model lru  # digits; --mnist_dir for sequential MNIST
    python examples/benchmarks/compare_cuts.py --task text                # Mamba; --train_file for another text
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import run_clm
import run_sequence_classification

from hf_compressm import (
    CompreSSMConfig,
    LRUConfig,
    LRUForSequenceClassification,
    S5Config,
    S5ForSequenceClassification,
    compress,
    enable_fast_selective_scan,
)
from hf_compressm.numerics import DiagonalSystem, balanced_truncation, relative_h2_error


Batch = Mapping[str, Tensor]
LINEAR_CUTS = {
    "complex (paper)": {"criterion": "hankel", "realization": "complex"},
    "real": {"criterion": "hankel"},
    "empirical": {"criterion": "empirical"},
}
SELECTIVE_CUTS = {
    "random, no repair": {"criterion": "surrogate", "keep": "random"},
    "surrogate (paper)": {"criterion": "surrogate"},
    "random, interpolated": {"criterion": "interpolative", "keep": "random"},
    "interpolated": {"criterion": "interpolative"},
}


def image_task(args: argparse.Namespace) -> tuple[PreTrainedModel, Callable[[], Batch], list[Batch]]:
    """A pixel-sequence classifier, a source of random training batches, and the held-out batches."""
    data_args = run_sequence_classification.DataArguments(mnist_dir=args.mnist_dir)
    (train_x, train_y), (test_x, test_y) = run_sequence_classification.load_data(data_args)
    common = {"input_size": train_x.shape[2], "num_labels": 10}
    if args.model == "lru":  # the paper's sequential MNIST model (table 1)
        config = LRUConfig(hidden_size=8, state_size=256, num_hidden_layers=1, norm="batch", dropout=0.1, **common)
        model = LRUForSequenceClassification(config)
    else:
        model = S5ForSequenceClassification(S5Config(hidden_size=64, state_size=128, num_hidden_layers=2, **common))

    def batch() -> Batch:
        rows = torch.randint(0, len(train_x), (args.batch_size,)).numpy()
        return {"input_values": torch.from_numpy(train_x[rows]), "labels": torch.from_numpy(train_y[rows]).long()}

    held_out = [
        {
            "input_values": torch.from_numpy(test_x[start : start + 250]),
            "labels": torch.from_numpy(test_y[start : start + 250]).long(),
        }
        for start in range(0, min(len(test_x), 2000), 250)
    ]
    return model, batch, held_out


def text_task(args: argparse.Namespace) -> tuple[PreTrainedModel, Callable[[], Batch], list[Batch]]:
    """A two-layer byte-level Mamba, a source of random training batches, and the held-out batches."""
    tokens = read_tokens(args.train_file)
    split = int(0.9 * len(tokens))
    size = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2}
    model = MambaForCausalLM(MambaConfig(state_size=args.state_size, **size))
    generator = torch.Generator().manual_seed(1)
    held_out = [cut_text(tokens[split:], 16, generator=generator) for _ in range(8)]
    return model, lambda: cut_text(tokens[:split], args.batch_size), held_out


def read_tokens(train_file: str | None) -> Tensor:
    """The bytes of a text file, or of Python's standard library."""
    files = [train_file] if train_file else None
    text = "\n".join(run_clm.read_texts(run_clm.DataArguments(train_file=files)))
    return torch.tensor(list(text.encode()))


def cut_text(source: Tensor, count: int, length: int = 256, generator: torch.Generator | None = None) -> Batch:
    """A batch of random pieces of a text."""
    starts = torch.randint(0, len(source) - length, (count,), generator=generator)
    rows = torch.stack([source[start : start + length] for start in starts])
    return {"input_ids": rows, "labels": rows}


def train(model: PreTrainedModel, batch: Callable[[], Batch], steps: int, learning_rate: float) -> None:
    """Train with AdamW at a constant rate."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", file=sys.stderr)


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Mean loss over batches of one size."""
    model.eval()
    return sum(model(**batch).loss.item() for batch in batches) / len(batches)


def compare(model: PreTrainedModel, batch: Callable[[], Batch], held_out: list[Batch], cuts: Mapping) -> None:
    """Print the loss right after each cut, as a table."""
    before, size = evaluate(model, held_out), model.config.state_size
    print(f"held-out loss before the cut: {before:.4f}\n\n| kept of {size} | {' | '.join(cuts)} |")
    print("|---" * (len(cuts) + 1) + "|")
    calibration = [batch() for _ in range(4)]
    for share in (2, 4, 8, 16, 32):
        losses = []
        for settings in cuts.values():
            cut = copy.deepcopy(model)
            compress(cut, CompreSSMConfig(target_state_size=size // share, **settings), calibration)
            losses.append(f"{evaluate(cut, held_out):.4f}")
        print(f"| {size // share} | {' | '.join(losses)} |", flush=True)


def compare_random_systems(seeds: int) -> None:
    """Relative error of the real map of random LRUs, N=256, H=8: H-infinity on a grid, and H2, mean over seeds."""
    print("| r | complex, H-infinity | real, H-infinity | complex, H2 | real, H2 |\n|---|---|---|---|---|")
    for rank in (32, 64, 128):
        rows = []
        for seed in range(seeds):
            system = random_lru(seed)
            angles = torch.cat([torch.linspace(0, math.pi, 400), system.eigenvalues.angle().abs()]).double()
            response = system.frequency_response(angles)
            norm = torch.linalg.matrix_norm(response, 2).max()
            row = []
            for realization in ("complex", "real"):
                reduced = balanced_truncation(system, rank, realization).system
                error = torch.linalg.matrix_norm(response - reduced.frequency_response(angles), 2).max()
                row += [float(error / norm), relative_h2_error(system, reduced)]
            rows.append(row)
        h_inf_complex, h2_complex, h_inf_real, h2_real = torch.tensor(rows).mean(dim=0).tolist()
        print(f"| {rank} | {h_inf_complex:.3f} | {h_inf_real:.3f} | {h2_complex:.3f} | {h2_real:.3f} |", flush=True)


def random_lru(seed: int, N: int = 256, H: int = 8) -> DiagonalSystem:
    """A freshly initialised LRU layer's system."""
    torch.manual_seed(seed)
    layer = LRUForSequenceClassification(LRUConfig(hidden_size=H, state_size=N, num_hidden_layers=1, input_size=1))
    with torch.no_grad():
        return DiagonalSystem(*layer.backbone.layers[0].ssm.system(torch.float64))


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("random", "images", "text"), default="images")
    parser.add_argument("--model", choices=("lru", "s5"), default="lru", help="for images")
    parser.add_argument("--mnist_dir", help="folder with MNIST's idx files; scikit-learn's digits without it")
    parser.add_argument("--train_file", help="text file; Python's standard library without it")
    parser.add_argument("--state_size", type=int, default=64, help="of the Mamba")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.task == "random":
        return compare_random_systems(seeds=3)
    torch.manual_seed(args.seed)
    enable_fast_selective_scan()
    model, batch, held_out = image_task(args) if args.task == "images" else text_task(args)
    train(model, batch, args.steps, args.learning_rate)
    compare(model, batch, held_out, LINEAR_CUTS if args.task == "images" else SELECTIVE_CUTS)
    return None


if __name__ == "__main__":
    main()
