"""The next value of a series that is made in place: an S5 in a plain PyTorch loop, cut while it learns.

    python examples/gallery/plain_loop_series.py [--steps 400]

Each series is a sum of three waves of random periods and phases, with noise. The loop calls `compressor.step()`, and
nothing else of the package.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, Compressor, S5Config, S5Model


LENGTH, WIDTH, STATES, LAYERS, BATCH, NOISE = 512, 24, 256, 2, 16, 0.1


class Forecaster(nn.Module):
    """A causal S5 backbone, and the next value from each of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": WIDTH, "state_size": STATES, "num_hidden_layers": LAYERS, "input_size": 1}
        self.backbone, self.head = S5Model(S5Config(**sizes)), nn.Linear(WIDTH, 1)

    def forward(self, series: Tensor) -> Tensor:
        """A forecast of every value but the first, `(batch, length - 1)`."""
        hidden = self.backbone(input_values=series[:, :-1, None]).last_hidden_state
        return self.head(hidden)[..., 0]


def make_series(count: int, generator: torch.Generator) -> Tensor:
    """Three waves with periods of 4 to 200 steps, and noise, `(count, length)`."""
    periods = 4 * 50 ** torch.rand(count, 3, 1, generator=generator)
    phases = torch.rand(count, 3, 1, generator=generator)
    waves = torch.sin(2 * torch.pi * (torch.arange(LENGTH) / periods + phases)).sum(dim=1)
    return waves + NOISE * torch.randn(count, LENGTH, generator=generator)


def error(model: Forecaster, series: Tensor) -> float:
    """Root mean square error of the forecasts."""
    with torch.no_grad():
        return float(F.mse_loss(model(series), series[:, 1:]).sqrt())


def main() -> None:
    """Train, with a cut after an eighth of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    held_out = make_series(64, generator)
    model = Forecaster().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    cuts = CompreSSMConfig(target_state_size=32, end=0.125, num_cuts=1)
    compressor = Compressor(model, cuts, optimizer, total_steps=steps)
    seconds = []
    for step in range(steps):
        series = make_series(BATCH, generator)
        start = time.perf_counter()
        F.mse_loss(model(series), series[:, 1:]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        before = error(model, held_out) if step + 1 == steps // 8 else None
        for event in compressor.step():
            print(
                f"cut after step {event.step}: {event.result.state_sizes_before} -> {event.result.state_sizes_after}"
            )
            print(f"error {before:.3f} before, {error(model, held_out):.3f} right after")
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: error {error(model, held_out):.3f} (noise {NOISE})", flush=True)
    early, late = sorted(seconds[: steps // 8]), sorted(seconds[steps // 4 :])
    kept = [layer.ssm.state_size for layer in model.backbone.layers]
    print(f"{STATES} -> {kept} states; a step is {early[len(early) // 2] / late[len(late) // 2]:.2f} times as fast")


if __name__ == "__main__":
    main()
