"""Handwritten digits, scanned along rows and columns from both ends: a four-direction block, cut while it learns.

    python examples/gallery/four_way_digits.py [--epochs 12]

The block has the layout of VMamba's SS2D: stacked projections, and one selective scan over four groups of channels.
The loop is a plain one, with one call of `compress` in it; what the cut wins is printed at the end.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, Layout, compress, declare_layer, rows, states
from hf_compressm.scans import selective_scan


WIDTH, STATES, RANK, BATCH, WAYS = 32, 32, 2, 64, 4


class FourWays(nn.Module):
    """Rows, columns, and both from the other end; `(batch, height, width, channels)`."""

    def __init__(self, width: int, d_state: int) -> None:
        super().__init__()
        self.d_state, inner = d_state, 2 * width
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.conv = nn.Conv2d(inner, inner, 3, groups=inner, padding=1)
        self.norm = nn.LayerNorm(inner)
        self.x_proj_weight = nn.Parameter(torch.randn(WAYS, RANK + 2 * d_state, inner) * inner**-0.5)
        self.dt_projs_weight = nn.Parameter(torch.randn(WAYS, inner, RANK) * RANK**-0.5)
        self.dt_projs_bias = nn.Parameter(torch.full((WAYS * inner,), -4.0))
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(WAYS * inner, 1))

    def forward(self, picture: Tensor) -> Tensor:
        """Convolution, the four scans, norm, gate and projection."""
        u, gate = self.in_proj(picture).chunk(2, dim=-1)
        u = F.silu(self.conv(u.permute(0, 3, 1, 2)))
        return self.out_proj(self.norm(self.scanned(u)) * F.silu(gate))

    def scanned(self, u: Tensor) -> Tensor:
        """The sum of the scans at every place, `(batch, height, width, channels)`."""
        height, width = u.shape[2:]
        lines = torch.stack([u.flatten(2), u.mT.flatten(2)], dim=1)
        ways = torch.cat([lines, lines.flip(-1)], dim=1)  # (batch, 4, channels, length)
        projected = torch.einsum("bkcl,krc->bkrl", ways, self.x_proj_weight)
        step, B, C = projected.split([RANK, self.d_state, self.d_state], dim=2)
        delta = torch.einsum("bkrl,kcr->bkcl", step, self.dt_projs_weight).flatten(1, 2)
        bias, A = self.dt_projs_bias, -self.A_logs.exp()
        y = selective_scan(ways.flatten(1, 2), delta, A, B, C, delta_bias=bias, delta_softplus=True)
        assert isinstance(y, Tensor)
        by_rows, by_columns = (y.unflatten(1, (2, 2, -1))[:, 0] + y.unflatten(1, (2, 2, -1))[:, 1].flip(-1)).unbind(1)
        by_columns = by_columns.unflatten(-1, (width, height)).mT
        return (by_rows.unflatten(-1, (height, width)) + by_columns).permute(0, 2, 3, 1)


declare_layer(
    FourWays,
    Layout(
        state_size="d_state",
        groups=WAYS,
        parts=(states("A_logs", by_group=True), rows("x_proj_weight", "*", "B", "C", folds=True, by_group=True)),
    ),
    example=(FourWays(8, d_state=4), torch.randn(2, 3, 5, 8)),
)


class Classifier(nn.Module):
    """Pixels, two blocks, and the mean over the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(FourWays(WIDTH, STATES) for _ in range(2))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits, `(batch, 10)`."""
        hidden = self.pixels(pictures[..., None])
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden = hidden + block(norm(hidden))
        return self.head(hidden.mean(dim=(1, 2)))


def accuracy(model: Classifier, pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures that are recognised."""
    model.eval()
    with torch.no_grad():
        found = (model(pictures).argmax(-1) == labels).float().mean()
    model.train()
    return float(found)


def main() -> None:
    """Train, cut after two epochs, and train on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    digits = load_digits()
    pictures, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    testing, training = order[:360], order[360:]
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seconds = []
    for epoch in range(epochs):
        if epoch == 2:
            sample = [pictures[rows] for rows in training[:256].split(BATCH)]
            before = accuracy(model, pictures[testing], labels[testing])
            result = compress(model, CompreSSMConfig(target_state_size=8), sample, optimizer)
            print(f"cut: {result.state_sizes_before} -> {result.state_sizes_after} in {result.seconds:.1f} s")
            after = accuracy(model, pictures[testing], labels[testing])
            print(f"accuracy {before:.3f} before, {after:.3f} right after")
        start = time.perf_counter()
        for batch in training[torch.randperm(len(training))].split(BATCH):
            F.cross_entropy(model(pictures[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        found = accuracy(model, pictures[testing], labels[testing])
        print(f"epoch {epoch + 1}: accuracy {found:.3f}, {seconds[-1]:.1f} s", flush=True)
    won = sum(seconds[:2]) / 2 / (sum(seconds[2:]) / max(len(seconds) - 2, 1))
    kept = model.blocks[0].d_state
    print(f"{STATES} -> {kept} states per channel and direction; an epoch is {won:.2f} times as fast")


if __name__ == "__main__":
    main()
