"""The scan of a Mamba-2 layer, `ssd_scan`, against the PyTorch code of stock `Mamba2ForCausalLM`, at several N.

Forward and backward, float32, best of several, each in a process of its own: batch 8, length 512, 8 heads of 64
channels, one group.

    python examples/benchmarks/mamba2_scan.py
"""

import argparse
from collections.abc import Callable

import torch
from measuring import HEADER, Row, best_seconds, in_own_process, machine
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2

from hf_compressm.scans import ssd_scan


def scan(peer: str, tensors: list[Tensor]) -> Tensor:
    """One scan, stock or ours."""
    x, dt, A, B, C, D, bias = tensors
    options = {"D": D, "dt_bias": bias, "dt_softplus": True}
    if peer == "stock":
        return modeling_mamba2.mamba2_chunk_scan(x, dt, A, B, C, chunk_size=Mamba2Config().chunk_size, **options)
    return ssd_scan(x, dt, A, B, C, **options)


def work(peer: str, state_size: int, batch: int, length: int) -> Callable[[], None]:
    """Forward and backward."""
    torch.manual_seed(0)
    A, D, bias = -torch.arange(1.0, 9), torch.ones(8), torch.full((8,), -4.0)
    B, C = (torch.randn(batch, length, 1, state_size) for _ in range(2))
    x, dt = torch.randn(batch, length, 8, 64), torch.randn(batch, length, 8)
    tensors = [tensor.requires_grad_() for tensor in (x, dt, A, B, C, D, bias)]
    return lambda: torch.autograd.backward(scan(peer, tensors).sum(), inputs=tensors)


def measure(peer: str, state_size: int, repeats: int, batch: int, length: int) -> float:
    """Seconds, the best of several."""
    return best_seconds(work(peer, state_size, batch, length), repeats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state_sizes", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--rounds", type=int, default=3, help="how often each pair is measured, for the spread")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args()
    shape = (1, 32) if options.smoke else (8, 512)
    print(f"{machine()}\n\n{HEADER}")
    for size in options.state_sizes:
        pairs = [
            [in_own_process(measure, peer, size, 3, *shape) for peer in ("ours", "stock")]
            for _ in range(options.rounds)
        ]
        ours, stock = (list(figures) for figures in zip(*pairs, strict=True))
        row = Row("-", f"scan of a Mamba-2 layer, N={size}", ours, {"stock": stock}, {})
        print("\n".join(row.lines()), flush=True)


if __name__ == "__main__":
    main()
