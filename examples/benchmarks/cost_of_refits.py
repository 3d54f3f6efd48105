"""What a refit costs: seconds of a cut with and without one, in training steps, and its peak memory against a step's.

A Mamba-2 of many layers is stepped, then cut to half of its states on four batches; each way in a process of its own.

    python examples/benchmarks/cost_of_refits.py [--layers 24] [--refit_steps 0 30 100]
"""

import argparse
import statistics
import time
from typing import Any

import torch
from cost_of_calibration import Peak
from measuring import in_own_process, machine
from transformers import Mamba2Config, Mamba2ForCausalLM

from hf_compressm import CompreSSMConfig, compress, enable_fast_selective_scan


WIDTH, LENGTH, BATCH, VOCABULARY, STATES = 64, 128, 8, 256, 64
CALIBRATION_BATCHES = 4
STEPS = 6


def measure(layers: int, refit_steps: int, threads: int) -> dict[str, float]:
    """Seconds and peak bytes of a step, and of a cut."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    enable_fast_selective_scan()
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": layers}
    heads = {"state_size": STATES, "num_heads": 2 * WIDTH // 32, "head_dim": 32, "n_groups": 1, "chunk_size": 64}
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    data = [torch.randint(VOCABULARY, (BATCH, LENGTH)) for _ in range(CALIBRATION_BATCHES)]
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in data]

    def step(number: int) -> float:
        start = time.perf_counter()
        model(**batches[number % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    model.train()
    with Peak() as of_step:
        seconds = statistics.median([step(number) for number in range(STEPS)][1:])
    start = time.perf_counter()
    with Peak() as of_cut:
        compress(model, CompreSSMConfig(fraction=0.5, refit_steps=refit_steps), batches, optimizer=optimizer)
    return {"step": seconds, "cut": time.perf_counter() - start, "memory": of_cut.bytes / of_step.bytes}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--refit_steps", nargs="+", type=int, default=[0, 30, 100])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"{machine()}; {args.threads} thread(s), {args.layers} layers of width {WIDTH}, batch {BATCH} x {LENGTH}")
    print("| refit steps | step, s | cut, s | in steps | peak memory, against a step's |\n|---|---|---|---|---|")
    for refit_steps in args.refit_steps:
        row = in_own_process(measure, args.layers, refit_steps, args.threads)
        figures = f"{row['step']:.3f} | {row['cut']:.2f} | {row['cut'] / row['step']:.1f} | {row['memory']:.2f}"
        print(f"| {refit_steps} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
