"""Whole runs with cuts against the bound of the speed-up, and what a cut costs a model of 130 million parameters."""

import statistics
import time
from typing import Any

import goals_lru
import goals_mamba
import torch
from measuring import Row, in_own_process, peak_memory
from torch.utils.data import Dataset
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.scans import enable_fast_selective_scan


RUNS = {"mamba": (128, 12, 16, 600), "lru": (256, 13, 50, 2000)}  # states before and after, batch, steps
SHARE = 0.1  # of the steps, before the last cut


class Timer(TrainerCallback):
    """Seconds of every step, from its start to its end: calibration and cuts fall between them or into one."""

    def __init__(self) -> None:
        """Start with no step."""
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.start)


class Repeated(Dataset):
    """A few random examples over and over."""

    def __init__(self, family: str, count: int):
        """Sequences of 256 bytes, or of 784 pixels."""
        generator = torch.Generator().manual_seed(0)
        if family == "mamba":
            tokens = torch.randint(0, 256, (64, 256), generator=generator)
            self.examples = [{"input_ids": row, "labels": row} for row in tokens]
        else:
            pixels = torch.randn(64, 784, 1, generator=generator)
            self.examples = [{"input_values": row, "labels": torch.tensor(i % 10)} for i, row in enumerate(pixels)]
        self.count = count

    def __len__(self) -> int:
        """As many as the run takes."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One example."""
        return self.examples[index % len(self.examples)]


def measure_run(family: str, directory: str, steps: int) -> dict[str, Any]:
    """Seconds of a whole `Trainer.train()` with one cut at a tenth of its steps, and of its steps before and after."""
    before, after, batch, _ = RUNS[family]
    made = goals_mamba.model(before) if family == "mamba" else goals_lru.model(1, before, 8)
    enable_fast_selective_scan()
    timer = Timer()
    arguments = TrainingArguments(
        directory,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    cut = CompreSSMCallback(CompreSSMConfig(target_state_size=after, end=SHARE, num_cuts=1))
    # The timer comes first, so that the cut at the start of a step counts as that step's.
    trainer = Trainer(made, arguments, train_dataset=Repeated(family, batch * steps), callbacks=[timer, cut])
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start
    edge = int(SHARE * steps)
    # Means, since the run pays for slow steps too; the first two of each kind warm up, and one of them has the cut.
    full, small = statistics.fmean(timer.seconds[2:edge]), statistics.fmean(timer.seconds[edge + 2 :])
    size = made.config.get_text_config().state_size if family == "mamba" else made.backbone.layers[0].ssm.state_size
    return {
        "total": total,
        "full": full,
        "small": small,
        "edge": edge,
        "states": size,
        "cut": max(timer.seconds[edge - 1 : edge + 1]),
    }


def run(family: str, rounds: int, directory: str, steps: int | None = None) -> list[Row]:
    """P6: the speed-up reached, as a share of the bound."""
    before, _, batch, usual = RUNS[family]
    steps = steps or usual
    ours, bounds, notes = [], [], []
    for _ in range(rounds):
        seen = in_own_process(measure_run, family, directory, steps)
        possible = seen["edge"] * seen["full"] + (steps - seen["edge"]) * seen["small"]
        ours.append(seen["total"])
        bounds.append(possible)
        print(f"  {family}: {seen}", flush=True)
        speed_up = steps * seen["full"]
        notes.append(f"{speed_up / seen['total']:.2f} of {speed_up / possible:.2f}")
    name = "byte-level Mamba, 2 layers" if family == "mamba" else "sMNIST's LRU, 1 layer"
    work = f"{name}, {before} to {seen['states']} states at {SHARE:.0%} of {steps} steps, batch {batch}"
    note = f"{name}: speed-up over the full model reached, and its bound: {', '.join(notes)}."
    return [Row("P6", work, ours, {"the steps alone": bounds}, {"the steps alone": 0.95}, note=note)]


def measure_cut(layers: int, hidden_size: int, length: int, vocab_size: int) -> dict[str, float]:
    """Seconds of a training step, and of calibration and a cut; the peak of memory before and after."""
    enable_fast_selective_scan()
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "state_size": 16}
    made = MambaForCausalLM(MambaConfig(vocab_size=vocab_size, **sizes)).train()
    optimizer = torch.optim.AdamW(made.parameters())
    tokens = torch.randint(0, vocab_size, (1, length))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        optimizer.zero_grad()
        made(tokens, labels=tokens).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = peak_memory()
    start = time.perf_counter()
    compress(made, CompreSSMConfig(target_state_size=8), [{"input_ids": tokens}] * 4, optimizer)
    return {"step": min(seconds), "cut": time.perf_counter() - start, "peak": peak, "with cut": peak_memory()}


def large_cut(rounds: int, shape: tuple[int, int, int, int] = (24, 768, 1024, 50280)) -> list[Row]:
    """P7."""
    runs = [in_own_process(measure_cut, *shape) for _ in range(rounds)]
    work = f"calibration (4 batches) and cut 16 to 8, Mamba-1, {shape[0]} layers of {2 * shape[1]} channels"
    return [
        Row(
            "P7", work, [run["cut"] for run in runs], {"5 steps": [5 * run["step"] for run in runs]}, {"5 steps": 1.0}
        ),
        Row(
            "P7",
            "peak of memory, steps and cut",
            [run["with cut"] for run in runs],
            {"1.05 times the steps' alone": [1.05 * run["peak"] for run in runs]},
            {"1.05 times the steps' alone": 1.0},
            "MiB",
        ),
    ]
