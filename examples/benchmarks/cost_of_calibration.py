"""What measuring costs a run: seconds and peak memory of a calibration, against those of one training step.

Each model is trained in a process of its own, by a Trainer, with the fast scan and float32. The step is the median of
those before the cut; the calibration is what a cut does to measure the layers, default settings.

On a GPU the host waits at every copy from the device. How often it would, in a calibration and the cut after it, is
counted for the shape of mamba-130m, on a device that only pretends to be one.

    python examples/benchmarks/cost_of_calibration.py [--threads 2]
"""

import argparse
import statistics
import tempfile
import threading
import time
from typing import Any

import psutil
import torch
from measuring import in_own_process, machine
from pretend_device import DEVICE, PretendDevice
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    LRUConfig,
    LRUForCausalLM,
    S5Config,
    S5ForCausalLM,
    compress,
)
from hf_compressm.compression import measuring as compression_measuring
from hf_compressm.utils import devices


WIDTH, LENGTH, BATCH, VOCABULARY = 256, 256, 8, 256
LAYERS, BATCHES, SHORT = 24, 4, 32
COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
MODELS: dict[str, Any] = {
    "mamba, N=16": lambda: MambaForCausalLM(MambaConfig(**COMMON, state_size=16)),
    "mamba, N=64": lambda: MambaForCausalLM(MambaConfig(**COMMON, state_size=64)),
    "mamba2, N=64": lambda: Mamba2ForCausalLM(
        Mamba2Config(**COMMON, state_size=64, num_heads=8, head_dim=64, n_groups=1)
    ),
    "lru, N=256": lambda: LRUForCausalLM(LRUConfig(**COMMON, state_size=256)),
    "s5, N=256": lambda: S5ForCausalLM(S5Config(**COMMON, state_size=256)),
}


class Watch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock, after the callback that cuts."""
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it; this callback comes first."""
        self.steps.append(time.perf_counter() - self.start)


class Peak:
    """The largest resident memory while it is open, in bytes."""

    def __enter__(self) -> "Peak":
        self.process, self.bytes, self.done = psutil.Process(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, self.process.memory_info().rss)


def measure(name: str, threads: int) -> dict[str, float]:
    """Train a model past one cut."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(VOCABULARY, (64, LENGTH))]
    seen: dict[str, float] = {}
    real, peaks = compression_measuring._collect, []

    def collect(*args: Any) -> Any:
        start = time.perf_counter()
        with Peak() as peak:
            found = real(*args)
        seen["calibration"], seen["calibration_bytes"] = time.perf_counter() - start, peak.bytes
        return found

    compression_measuring._collect = collect
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=8,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        settings = CompreSSMConfig(fraction=0.5, end=6, num_cuts=1)
        trainer = Trainer(MODELS[name](), args, train_dataset=rows, callbacks=[watch, CompreSSMCallback(settings)])
        step = trainer.training_step

        def training_step(*args: Any) -> Any:
            with Peak() as peak:
                result = step(*args)
            peaks.append(peak.bytes)
            return result

        trainer.training_step = training_step
        trainer.train()
    return {**seen, "step": statistics.median(watch.steps[1:6]), "step_bytes": max(peaks[:6])}


def waits(criterion: str) -> int:
    """How often the host waits for the device in a calibration and cut of the shape of mamba-130m."""
    devices.WITH_FLOAT64 = (*devices.WITH_FLOAT64, DEVICE.type)  # as a GPU has it
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=768, state_size=16, num_hidden_layers=LAYERS)
    batches = [{"input_ids": row, "labels": row} for row in torch.randint(VOCABULARY, (BATCHES, 1, SHORT))]
    with PretendDevice() as device:
        model = device.place(MambaForCausalLM(config))
        compress(model, CompreSSMConfig(fraction=0.5, criterion=criterion), device.on_device(batches))
    return device.count


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    print(f"{machine()}, {threads} thread(s), batch {BATCH} x {LENGTH}, width {WIDTH}, 2 layers")
    print(
        "| model | step, s | calibration, s | in steps | peak memory, against that of a step |\n|---|---|---|---|---|"
    )
    for name in MODELS:
        row = in_own_process(measure, name, threads)
        ratio, memory = row["calibration"] / row["step"], row["calibration_bytes"] / row["step_bytes"]
        print(f"| {name} | {row['step']:.3f} | {row['calibration']:.3f} | {ratio:.2f} | {memory:.2f} |", flush=True)
    print(
        f"\nmamba-130m, {LAYERS} layers, {BATCHES} batches\n| criterion | waits | per layer and batch |\n|---|---|---|"
    )
    for criterion in ("interpolative", "surrogate", "fisher"):
        count = in_own_process(waits, criterion)
        print(f"| {criterion} | {count} | {count / (LAYERS * BATCHES):.2f} |", flush=True)


if __name__ == "__main__":
    main()
