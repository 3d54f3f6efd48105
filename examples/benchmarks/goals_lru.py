"""LRU on a CPU: training steps and one cut, against the reference implementation and s5-pytorch's layer."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Row, best_seconds, in_own_process, in_python
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, LRUConfig, LRUForSequenceClassification, compress
from hf_compressm.scans import diagonal_scan


STEPS = {"P3": (1, 256, 8, 50, 784), "P4": (2, 384, 128, 8, 1024)}  # layers, N, H, batch, length
WANTED = {"P3": {"reference": 6}, "P4": {"reference": 5}}
CUT = (2, 384, 128, 96)  # layers, N, H, N after the cut
SCRIPT = Path(__file__).with_name("reference_lru.py")


def model(layers: int, state_size: int, hidden_size: int) -> LRUForSequenceClassification:
    """Batch norm, gated activation and dropout, as in the reference."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "state_size": state_size, "num_hidden_layers": layers, "input_size": 1}
    return LRUForSequenceClassification(LRUConfig(num_labels=10, norm="batch", dropout=0.1, **sizes))


def measure_step(layers: int, state_size: int, hidden_size: int, batch: int, length: int, repeats: int) -> float:
    """Seconds of a whole training step, the best of several."""
    made = model(layers, state_size, hidden_size).train()
    optimizer = torch.optim.AdamW(made.parameters())
    inputs, labels = torch.randn(batch, length, 1), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        made(input_values=inputs, labels=labels).loss.backward()
        optimizer.step()

    return best_seconds(step, repeats, warm_up=2)


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


def measure_layer(state_size: int, hidden_size: int, batch: int, length: int, repeats: int) -> tuple[float, float]:
    """Seconds of one layer, forward plus backward: s5-pytorch's and ours."""
    peer, ours = layer_steps(state_size, hidden_size, batch, length)
    return best_seconds(peer, repeats), best_seconds(ours, repeats)


def measure_cut(realization: str, repeats: int) -> float:
    """Seconds of spectra, plan and writing."""
    layers, state_size, hidden_size, rank = CUT
    made = model(layers, state_size, hidden_size)
    settings = CompreSSMConfig(target_state_size=rank, criterion="hankel", realization=realization)
    copies = [copy.deepcopy(made) for _ in range(repeats + 1)]
    return best_seconds(lambda: compress(copies.pop(), settings), repeats)


def steps(goal: str, rounds: int, repeats: int, clone: Path | None, python: str) -> list[Row]:
    """P3 or P4."""
    layers, state_size, hidden_size, batch, length = shape = STEPS[goal]
    ours, reference, theirs, layer = [], [], [], []
    for _ in range(rounds):
        ours.append(in_own_process(measure_step, *shape, repeats))
        if clone is not None:
            reference.append(min(in_python(python, SCRIPT, clone, "step", *shape, repeats)["seconds"]))
        pair = in_own_process(measure_layer, state_size, hidden_size, batch, length, repeats)
        theirs.append(pair[0])
        layer.append(pair[1])
    size = f"N={state_size}, H={hidden_size}, batch {batch}, length {length}"
    work = f"LRU step, {layers} {'layer' if layers == 1 else 'layers'}, {size}"
    rows = [Row(goal, work, ours, {"reference": reference}, WANTED[goal])]
    wanted = {"s5-pytorch": 3.0} if goal == "P4" else {}
    layer_row = Row(goal, f"one layer alone, forward and backward, {size}", layer, {"s5-pytorch": theirs}, wanted)
    return [*(rows if clone is not None else []), layer_row]


def cut(rounds: int, repeats: int, clone: Path, python: str) -> list[Row]:
    """P5, in both realizations: the reference's own, complex, and the default, real, of twice the order."""
    layers, state_size, hidden_size, rank = CUT
    figures: dict[str, list[float]] = {"complex": [], "real": []}
    reference = []
    for _ in range(rounds):
        for realization, seconds in figures.items():
            seconds.append(in_own_process(measure_cut, realization, repeats))
        reference.append(min(in_python(python, SCRIPT, clone, "cut", *CUT, repeats)["seconds"]))
    work = f"one cut, {layers} LRU layers, N={state_size} to {rank}, H={hidden_size}"
    return [
        Row(
            "P5",
            f"{work}, {realization} balancing in double precision",
            seconds,
            {"reference": reference},
            {"reference": 10},
        )
        for realization, seconds in figures.items()
    ]
