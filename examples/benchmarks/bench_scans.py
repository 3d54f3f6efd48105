"""How fast the scans are, each as a ratio against its peer in the same run.

Three comparisons, forward plus backward, float32, best of several:

- one training step of stock `MambaForCausalLM` (2 layers) with and without `enable_fast_selective_scan`;
- the scan of one Mamba-2 layer alone: `ssd_scan` against the PyTorch code of stock `Mamba2ForCausalLM`;
- one layer of the size of a small S5 or LRU model: `diagonal_scan` against s5-pytorch's layer, at two shapes.

Ratios hold better than seconds on a busy machine. The stock loop at 128 states takes minutes per step: it is run
once, without a warm-up, or left out with `--skip-stock-128`. Older versions of transformers (5.17) take a quarter of a
minute and more for the stock Mamba-2 scan, and several gigabytes.

    python examples/benchmarks/bench_scans.py --state-sizes 16 128 --ssd-state-sizes 16 64 128 --repeats 5
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

import torch
from measuring import best_seconds, machine
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig, MambaForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from hf_compressm.scans import (
    diagonal_scan,
    disable_fast_selective_scan,
    enable_fast_selective_scan,
    selective_scan,
    ssd_scan,
)


LAYER_SHAPES = {"long and thin": (256, 8, 50, 784), "wide": (384, 128, 8, 1024)}  # (N, H, batch, length)
SLOW_STATE_SIZE = 128  # from here on the stock loop takes minutes


def mamba_step(state_size: int) -> Callable[[], None]:
    """One training step of a two-layer Mamba: hidden size 256, batch 8, length 256, vocabulary 256."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=256, state_size=state_size, num_hidden_layers=2)
    model = MambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 256, (8, 256))

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def selective_layer(state_size: int) -> Callable[[], None]:
    """The scan of one such layer alone: batch 8, 512 channels, length 256."""
    torch.manual_seed(0)
    u, z = torch.randn(8, 512, 256, requires_grad=True), torch.randn(8, 512, 256, requires_grad=True)
    delta = (torch.randn(8, 512, 256) - 4).requires_grad_()
    A = (-torch.arange(1.0, state_size + 1).repeat(512, 1)).requires_grad_()
    B, C = (torch.randn(8, state_size, 256, requires_grad=True) for _ in range(2))

    def step() -> None:
        selective_scan(u, delta, A, B, C, z=z, delta_softplus=True).sum().backward()

    return step


def ssd_layer(state_size: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The scan of a Mamba-2 layer, stock and ours: batch 8, length 512, 8 heads of 64 channels, one group."""
    torch.manual_seed(0)
    x, dt = torch.randn(8, 512, 8, 64, requires_grad=True), torch.randn(8, 512, 8, requires_grad=True)
    A, D, bias = (-torch.arange(1.0, 9)).requires_grad_(), torch.ones(8, requires_grad=True), torch.full((8,), -4.0)
    B, C = (torch.randn(8, 512, 1, state_size, requires_grad=True) for _ in range(2))
    chunk_size = Mamba2Config().chunk_size
    options = {"D": D, "dt_bias": bias.requires_grad_(), "dt_softplus": True}

    def stock() -> None:
        modeling_mamba2.mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk_size, **options).sum().backward()

    def ours() -> None:
        ssd_scan(x, dt, A, B, C, **options).sum().backward()

    return stock, ours


class DiagonalLayer(nn.Module):
    """What s5-pytorch's layer computes, y = Re(C h) + D u with a zero-order hold, on `diagonal_scan`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.parameters_of = layer.seq

    def forward(self, u: Tensor) -> Tensor:
        """U (batch, length, H) -> y (batch, length, H)."""
        layer = self.parameters_of
        B, C = layer.get_BC_tilde()
        eigenvalues = torch.exp(layer.Lambda * torch.exp(layer.log_step))
        B = ((eigenvalues - 1) / layer.Lambda)[:, None] * B
        return diagonal_scan(u, eigenvalues, B, C) + layer.D * u


def layer_steps(N: int, H: int, batch: int, length: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward plus backward of s5-pytorch's layer and of ours with the same parameters; checks that they agree."""
    torch.manual_seed(0)
    peer = importlib.import_module("s5.s5_model").S5(H, N)
    ours = DiagonalLayer(peer)
    u = torch.randn(batch, length, H, requires_grad=True)
    with torch.no_grad():
        left, right = peer(u[:2]), ours(u[:2])
        difference = ((left - right).abs().max() / left.abs().max()).item()
    if not difference < 1e-3:
        raise RuntimeError(
            f"The two layers differ by {difference:.1e} of the largest output; expected float32 round-off."
        )

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        layer(u).square().mean().backward()

    return (lambda: step(peer)), (lambda: step(ours))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--state-sizes", type=int, nargs="*", default=[16, 128], help="state sizes of the Mamba models"
    )
    parser.add_argument(
        "--ssd-state-sizes", type=int, nargs="*", default=[16, 64, 128], help="state sizes of the Mamba-2 layers"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the best counts")
    parser.add_argument("--skip-stock-128", action="store_true", help="leave out the stock loop from 128 states on")
    parser.add_argument("--skip-layers", action="store_true", help="leave out the comparison with s5-pytorch")
    return parser.parse_args()


def print_row(work: str, peer: float | None, ours: float) -> None:
    """One line of the table."""
    shown, ratio = ("-", "-") if peer is None else (f"{peer:.3f}", f"{peer / ours:.1f}")
    print(f"| {work:<64} | {shown:>9} | {ours:>8.3f} | {ratio:>6} |", flush=True)


def main() -> None:
    """Run the comparisons and print the table."""
    arguments = parse_arguments()
    print(machine())
    print(f"| {'forward + backward':<64} | {'peer, s':>9} | {'ours, s':>8} | {'ratio':>6} |")
    print(f"|{'-' * 66}|{'-' * 11}|{'-' * 10}|{'-' * 8}|")
    if not arguments.skip_layers:
        for name, shape in LAYER_SHAPES.items():
            peer, ours = layer_steps(*shape)
            work = "s5-pytorch layer, {}: N={} H={} batch {} length {}".format(name, *shape)
            print_row(work, best_seconds(peer, arguments.repeats), best_seconds(ours, arguments.repeats))
    for state_size in arguments.ssd_state_sizes:
        stock, ours = ssd_layer(state_size)
        peer_seconds = best_seconds(stock, min(3, arguments.repeats))
        print_row(
            f"stock Mamba-2 scan, one layer, N={state_size}", peer_seconds, best_seconds(ours, arguments.repeats)
        )
    for state_size in arguments.state_sizes:
        print_row(
            f"selective scan alone, N={state_size}", None, best_seconds(selective_layer(state_size), arguments.repeats)
        )
        slow = state_size >= SLOW_STATE_SIZE
        step = mamba_step(state_size)
        enable_fast_selective_scan()
        ours = best_seconds(step, arguments.repeats)
        disable_fast_selective_scan()
        peer = None
        if not (slow and arguments.skip_stock_128):
            peer = best_seconds(step, 1 if slow else min(2, arguments.repeats), warm_up=0 if slow else 1)
        print_row(f"stock Mamba training step, 2 layers, N={state_size}", peer, ours)


if __name__ == "__main__":
    main()
