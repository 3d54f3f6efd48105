"""Draws the pictures of these pages from small runs; about ten minutes on one core.

`python docs/draw.py [NAME ...]` writes `docs/figures/NAME.png`; without names it draws all of them. The numbers that
the pages quote are printed. Needs the `examples` extra; nothing is downloaded.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    LRUConfig,
    LRUForSequenceClassification,
    analyze,
    compress,
    enable_fast_selective_scan,
)
from hf_compressm.compression import rank_stability, state_scores
from hf_compressm.data import ByteTokenizer, TextSource, read_texts, split_into_blocks
from hf_compressm.numerics import DiagonalSystem, balanced_truncation, hankel_singular_values
from hf_compressm.reports.plots.figures import COLOURS, MARKERS, new_figure, save_figure


FIGURES = Path(__file__).parent / "figures"
BATCH, STEPS, STATES = 16, 300, 64


def text_batches(block_size: int = 128) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Training and held-out batches of bytes of Python's standard library."""
    blocks = split_into_blocks(
        ByteTokenizer()(read_texts(TextSource(max_characters=700_000)))["input_ids"], block_size
    )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in torch.tensor(blocks)[order].split(BATCH)]
    return batches[8:-1], batches[:8]


def trained(
    model: Any, batches: list[dict[str, Tensor]], rate: float, see: Callable[[int], None] | None = None
) -> Any:
    """The model after `STEPS` steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(STEPS):
        if see is not None and step % 10 == 0:
            see(step)
        model.train()(**batches[step % len(batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def held_out_loss(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean loss."""
    return statistics.fmean(float(model.eval()(**batch).loss) for batch in batches)


def mamba(kind: type, config: type, **sizes: Any) -> Any:
    """A byte-level model of two layers."""
    set_seed(0)
    return kind(config(vocab_size=256, hidden_size=64, state_size=STATES, num_hidden_layers=2, **sizes))


def mamba1() -> Any:
    """A new Mamba."""
    return mamba(MambaForCausalLM, MambaConfig)


def spectrum() -> None:
    """HSVs of an LRU before and after training, and the energy that the first k of them hold."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().flatten(1)[:, :, None] / 16  # (images, 64 steps, 1)
    labels = torch.from_numpy(digits.target)
    set_seed(0)
    model = LRUForSequenceClassification(
        LRUConfig(input_size=1, num_labels=10, hidden_size=32, state_size=STATES, num_hidden_layers=2)
    )
    batches = [{"input_values": x, "labels": y} for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)]
    settings = CompreSSMConfig(tolerance=0.1, criterion="hankel")
    plans = {"before training": analyze(model, settings)}
    trained(model, batches, 4e-3)
    plans["after 300 steps"] = analyze(model, settings)
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    for number, (when, plan) in enumerate(plans.items()):
        for place, layer in enumerate(plan.layers, start=1):
            sigma = layer.hankel_singular_values
            index = [(count + 1) / 2 for count in range(len(sigma))]
            style = {"color": COLOURS[number], "linestyle": "-" if place == 1 else "--"}
            energy = (sigma.cumsum(0) / sigma.sum()).tolist()
            name = f"{when}, layer {place}"
            left.plot(index, (sigma / sigma[0]).clamp(min=1e-8).tolist(), label=name, **style)
            right.plot(index, energy, **style)
            print(f"spectrum: {name}: {layer.new_state_size} of {layer.state_size} states at tolerance 0.1")
    right.axhline(0.9, color="black", linewidth=0.8, linestyle=":")
    right.annotate("tolerance 0.1", (STATES, 0.9), ha="right", va="top")
    left.set(yscale="log", xlabel="number of states", ylabel="Hankel singular value\n(share of the largest)")
    right.set(xlabel="number of states", ylabel="energy of the first\n(share of the sum)")
    left.legend(frameon=False, fontsize=9)
    save_figure(figure, FIGURES / "spectrum.png")


def bound() -> None:
    """Error of balanced truncation of a random LRU at every size, beside the bound."""
    generator = torch.Generator().manual_seed(0)
    radius = 0.9 + 0.099 * torch.rand(STATES, generator=generator, dtype=torch.float64)
    angle = torch.pi * torch.rand(STATES, generator=generator, dtype=torch.float64)
    B, C = (torch.randn(*shape, generator=generator, dtype=torch.complex128) for shape in ((STATES, 4), (4, STATES)))
    system = DiagonalSystem(torch.polar(radius, angle), B * (1 - radius[:, None] ** 2) ** 0.5, C)
    grid = torch.cat([torch.linspace(0, torch.pi, 1000, dtype=torch.float64), angle])
    gain = float(torch.linalg.matrix_norm(system.frequency_response(grid), 2).max())
    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    sizes = range(2, STATES, 4)
    for number, realization in enumerate(("real", "complex")):
        cuts = [balanced_truncation(system, size, realization) for size in sizes]
        errors = [system.frequency_response(grid) - cut.system.frequency_response(grid) for cut in cuts]
        worst = [float(torch.linalg.matrix_norm(error, 2).max()) / gain for error in errors]
        style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}
        axes.plot(sizes, worst, label=f"error, {realization} system balanced", **style)
        if realization == "real":
            bounds = [cut.error_bound / gain for cut in cuts]
            axes.plot(sizes, bounds, color=COLOURS[number], linestyle=":", label="bound for the real one")
            assert all(error <= limit for error, limit in zip(worst, bounds, strict=True))
        print(f"bound: {realization}:", *(f"{size}: {error:.3f}," for size, error in zip(sizes, worst, strict=True)))
    axes.set(
        yscale="log", xlabel="states kept of 64", ylabel="largest error over all frequencies\n(share of the gain)"
    )
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, FIGURES / "bound.png")
    print("bound: sum of the HSVs", float(hankel_singular_values(system).sum()))


def ranking() -> None:
    """How soon the ranking of a Mamba's states is what it is at the end."""
    train, held_out = text_batches()
    settings, model, seen = CompreSSMConfig(), mamba1(), {}
    trained(model, train, 3e-3, lambda step: seen.__setitem__(step, state_scores(model, settings, held_out[:2])))
    last = state_scores(model, settings, held_out[:2])
    steps = list(seen)
    to_last = [statistics.fmean(rank_stability(seen[step], last).values()) for step in steps]
    pairs = itertools.pairwise(steps)
    between = [statistics.fmean(rank_stability(seen[one], seen[two]).values()) for one, two in pairs]
    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    axes.plot(steps, to_last, color=COLOURS[0], marker="o", markersize=4, label="with the ranking at the end")
    axes.plot(steps[1:], between, color=COLOURS[1], marker="s", markersize=4, label="with the one 10 steps before")
    axes.axhline(0.95, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer steps done", ylabel="rank correlation of the states", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, FIGURES / "ranking.png")
    print("ranking: to the end:", *(f"{step}: {value:.3f}," for step, value in zip(steps, to_last, strict=True)))
    print("ranking: successive:", *(f"{step}: {value:.3f}," for step, value in zip(steps[1:], between, strict=True)))


def first_output(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """What the first layer's mixer puts out, over all batches."""
    outputs: list[Tensor] = []
    hook = model.backbone.layers[0].mixer.register_forward_hook(lambda module, args, out: outputs.append(out))
    held_out_loss(model, batches)
    hook.remove()
    return torch.cat([out[0] if isinstance(out, tuple) else out for out in outputs])


def compare_ways(name: str, model: Any, train: Any, held_out: Any, ways: dict[str, dict[str, Any]]) -> None:
    """Loss right after cuts of several kinds, and the predicted error of the first layer beside the measured one."""
    before, output = held_out_loss(model, held_out), first_output(model, held_out)
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    for number, (way, settings) in enumerate(ways.items()):
        losses, predicted, measured, sizes = [], [], [], (48, 32, 24, 16, 12, 8, 4)
        for size in sizes:
            cut = copy.deepcopy(model)
            done = compress(cut, CompreSSMConfig(target_state_size=size, **settings), train[:4])
            losses.append(held_out_loss(cut, held_out) - before)
            error = first_output(cut, held_out) - output
            measured.append(float(error.norm() / output.norm()))
            predicted.append(done.plan.layers[0].predicted_error)
        style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}
        left.plot(sizes, losses, label=way, **style)
        right.plot(sizes, measured, label=f"{way}: measured", **style)
        right.plot(sizes, predicted, label="predicted", color=COLOURS[number], linestyle=":")
        rows = zip(sizes, losses, predicted, measured, strict=True)
        print(
            f"{name}: {way}, loss {before:.4f} before:", *(f"{n}: {a:+.4f} ({b:.3f}, {c:.3f})," for n, a, b, c in rows)
        )
    left.set(xlabel="states kept of 64", ylabel="held-out loss added by the cut")
    right.set(xlabel="states kept of 64", ylabel="relative error of the\nfirst layer's output")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, FIGURES / f"{name}.png")


def interpolation() -> None:
    """A Mamba cut by selection with interpolation, by the paper's averaged systems, and at random."""
    train, held_out = text_batches()
    ways: dict[str, dict[str, Any]] = {
        "interpolative": {},
        "surrogate (paper)": {"criterion": "surrogate"},
        "random, interpolated": {"keep": "random"},
    }
    compare_ways("interpolation", trained(mamba1(), train, 3e-3), train, held_out, ways)


def projection() -> None:
    """A Mamba-2 cut by selection and by balanced projection."""
    train, held_out = text_batches()
    model = mamba(Mamba2ForCausalLM, Mamba2Config, num_heads=4, head_dim=32, n_groups=1)
    ways: dict[str, dict[str, Any]] = {"stock (selection)": {}, "best (projection)": {"compat": "best"}}
    compare_ways("projection", trained(model, train, 3e-3), train, held_out, ways)


def cost() -> None:
    """Seconds of a training step, and bytes of state, against the state size."""
    sizes, seconds, state_bytes = (8, 16, 32, 64, 128), [], []
    batch = torch.randint(256, (8, 256), generator=torch.Generator().manual_seed(0))
    for size in sizes:
        model = MambaForCausalLM(
            MambaConfig(vocab_size=256, hidden_size=128, state_size=size, num_hidden_layers=2)
        ).train()
        times = []
        for _ in range(6):
            start = time.perf_counter()
            model(input_ids=batch, labels=batch).loss.backward()
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times[1:]))
        state_bytes.append(2 * 256 * size * 4 / 1024)
    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    axes.plot(sizes, seconds, color=COLOURS[0], marker="o")
    axes.set(xlabel="state size", ylabel="seconds, forward and backward", ylim=(0, None))
    beside = axes.twinx()
    beside.plot(sizes, state_bytes, color=COLOURS[1], marker="s", linestyle="--")
    beside.set(ylabel="KiB of state of one sequence", ylim=(0, None))
    axes.yaxis.label.set_color(COLOURS[0])
    beside.yaxis.label.set_color(COLOURS[1])
    save_figure(figure, FIGURES / "cost.png")
    print("cost:", *(f"{n}: {s:.3f} s, {b:.0f} KiB;" for n, s, b in zip(sizes, seconds, state_bytes, strict=True)))


def cuts() -> None:
    """Loss and state size over a run of the Trainer with the default schedule."""
    train, _ = text_batches()
    examples = [{"input_ids": row, "labels": row} for batch in train for row in batch["input_ids"]]
    settings = CompreSSMConfig(tolerance=0.1)
    figure = new_figure(7, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, callbacks in enumerate(([], [CompreSSMCallback(settings)])):
        args = TrainingArguments(
            "runs/docs",
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(mamba1(), args, train_dataset=examples, callbacks=callbacks)
        trainer.train()
        log = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
        sizes = [(0, STATES)] + [
            (row["step"], row["compressm/state_size_mean"])
            for row in trainer.state.log_history
            if "compressm/cut" in row
        ]
        label = "with the callback" if callbacks else "without"
        upper.plot(*zip(*log, strict=True), color=COLOURS[number], label=label, linestyle="--" if number == 0 else "-")
        lower.step(
            *zip(*sizes, (STEPS, sizes[-1][1]), strict=True),
            where="post",
            color=COLOURS[number],
            linestyle="--" if number == 0 else "-",
        )
        print(f"cuts: {label}: sizes {sizes}, loss at the end {log[-1]}, {trainer.state.log_history[-1]}")
    upper.set(ylabel="training loss")
    upper.legend(frameon=False, fontsize=9)
    lower.set(xlabel="optimizer steps done", ylabel="state size", ylim=(0, None))
    save_figure(figure, FIGURES / "cuts.png")


DRAWINGS = (spectrum, bound, cost, ranking, cuts, interpolation, projection)


if __name__ == "__main__":
    enable_fast_selective_scan()
    known = {draw.__name__: draw for draw in DRAWINGS}
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        sys.exit(f"There is no drawing {unknown[0]!r}; choose from {', '.join(known)}.")
    for chosen in sys.argv[1:] or known:
        known[chosen]()
