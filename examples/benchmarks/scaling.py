"""How the cost of the scans grows with length, states, batch and channels, and where it departs from a straight line.

Forward and backward, float32, best of several; what does not vary is batch 4, length 1024, 64 channels and 64 states.
Lengths go from 1 to 65,536, one sequence at a time. `--output` draws `scaling.png`.

    python examples/benchmarks/scaling.py --output .
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import best_seconds, machine
from plots import draw_scaling

from hf_compressm.scans import diagonal_scan, selective_scan


USUAL = {"length": 1024, "states": 64, "batch": 4, "channels": 64}
SIZES = {
    "length": [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536],
    "states": [1, 4, 16, 64, 256],
    "batch": [1, 2, 4, 8, 16, 32],
    "channels": [1, 4, 16, 64, 256],
}


def selective(length: int, states: int, batch: int, channels: int) -> Callable[[], None]:
    """A Mamba-1 layer's scan."""
    torch.manual_seed(0)
    u, delta = (torch.randn(batch, channels, length) for _ in range(2))
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    B, C = (torch.randn(batch, states, length) for _ in range(2))
    tensors = [tensor.requires_grad_() for tensor in (u, delta - 4, A, B, C)]
    return lambda: torch.autograd.backward(selective_scan(*tensors, delta_softplus=True).sum(), inputs=tensors)


def diagonal(length: int, states: int, batch: int, channels: int) -> Callable[[], None]:
    """An S5 or LRU layer's scan, with as many inputs and outputs as the other has channels."""
    torch.manual_seed(0)
    u = torch.randn(batch, length, channels)
    eigenvalues = torch.polar(torch.rand(states) * 0.1 + 0.9, torch.rand(states) * 6)
    B, C = torch.randn(states, channels, dtype=torch.complex64), torch.randn(channels, states, dtype=torch.complex64)
    tensors = [tensor.requires_grad_() for tensor in (u, eigenvalues, B, C)]
    return lambda: torch.autograd.backward(diagonal_scan(*tensors).sum(), inputs=tensors)


SCANS = {"selective scan (Mamba)": selective, "diagonal scan (S5, LRU)": diagonal}


def measure(quantity: str, sizes: list[int], repeats: int) -> dict[str, list[tuple[int, float]]]:
    """Seconds of each scan at every size of one quantity."""
    curves: dict[str, list[tuple[int, float]]] = {}
    usual = USUAL | ({"batch": 1} if quantity == "length" else {})
    for name, make in SCANS.items():
        for size in sizes:
            seconds = best_seconds(make(**usual | {quantity: size}), repeats)
            curves.setdefault(name, []).append((size, seconds))
            print(f"| {name} | {quantity} {size} | {seconds:.4f} s | {seconds / size:.3g} s each |", flush=True)
    return curves


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for scaling.json and scaling.png")
    parser.add_argument("--smoke", action="store_true", help="only the smallest two sizes of each quantity")
    options = parser.parse_args()
    print(machine())
    sizes = {quantity: kept[:2] if options.smoke else kept for quantity, kept in SIZES.items()}
    curves = {quantity: measure(quantity, kept, options.repeats) for quantity, kept in sizes.items()}
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "curves": curves}
        (options.output / "scaling.json").write_text(json.dumps(record), encoding="utf-8")
        draw_scaling(curves, options.output / "scaling.png")


if __name__ == "__main__":
    main()
