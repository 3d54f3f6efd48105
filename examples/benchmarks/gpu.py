"""One session on a GPU, ten minutes at most: are the Triton kernels right, how fast is training, and what stalls?

In this order, what matters most first:

- Triton's cache is built by one process per core;
- the selective scan against float64: output, last state and every gradient, at three odd shapes in float32 and
  bfloat16, relative to the largest entry; and whether three runs give the same bits;
- the selective scan alone (batch 8, 1536 channels, length 2048, bfloat16) at N = 128 to 12, forward, and forward with
  backward: mamba-ssm's `selective_scan_fn`, our Triton kernels with the share of their roofline, our PyTorch scan;
- whole training steps (forward, backward, fused AdamW, bfloat16 autocast, batch 8, length 2048) in the shape of
  mamba-130m, with the same three, and compiled; and of mamba2-130m;
- a run of a `Trainer` without the callback and with it: seconds, how often the host waited for the GPU, the cut;
- LRU in the shape of the paper's sCIFAR (6 layers, N=384, H=512, length 1024, batch 50, float32) and cut to 96
  states, with the Triton boundary kernels and with the loop. The paper's own speed-up from this cut on is 1.5.

Times are medians, between two events of the GPU. A figure is a line of `--results` as soon as it is there. The same
command passes over it on the same card with the same versions, and tries again what failed or was skipped; after a
change of the kernels, take another file. The table is printed last and written beside the results.

    python examples/benchmarks/gpu.py
    python examples/benchmarks/gpu.py --budget 0    # the table of what is there
    python examples/benchmarks/gpu.py --only "scan, *" "step of a Mamba-1, triton*"
    python examples/benchmarks/gpu.py --smoke       # toy sizes, on the CPU too
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "comparison"))

import torch
from gpu_session import cache, scans, steps, trainers
from gpu_session.hardware import hardware
from gpu_session.scale import Scale, full, toy
from gpu_session.session import Figure, Session
from gpu_session.tables import table
from rows import Results


CACHE, SECONDS_OF_CACHE = "Triton's cache", 150


def figures(scale: Scale) -> Iterator[Figure]:
    """All of a session, what matters most first; seconds that a figure needs are guesses for an H100."""

    def lines(
        section: str, way: str, sizes: tuple[int, ...], measure: Callable[..., dict[str, Any]], needs: float
    ) -> Iterator[Figure]:
        worker = way.removesuffix(steps.COMPILED) if section != trainer else "triton"
        yield from (Figure(section, way, size, measure, needs, worker) for size in sizes)

    def checks(way: str) -> Iterator[Figure]:
        for dtype in ("float32", "bfloat16"):
            measure = partial(scans.errors, dtype=dtype)
            yield from lines(f"scan against float64, {dtype}", way, tuple(scale.checked), measure, 8)

    trainer = f"Trainer, {scale.trainer_steps} steps, a cut to {scale.ends[1]}"
    mamba, mamba2, lru = (partial(steps.step_times, family=family) for family in ("mamba", "mamba2", "lru"))
    yield from checks("triton")
    yield from lines("scan", "triton", scale.states, scans.times, 4)
    yield from lines("step of a Mamba-1", "triton", scale.states, mamba, 15)
    yield from lines("scan", "mamba-ssm", scale.states, scans.times, 5)
    yield from lines("step of a Mamba-1", "mamba-ssm", scale.states, mamba, 15)
    yield from lines(trainer, trainers.WITHOUT, scale.ends[:1], trainers.run_times, 30)
    yield from lines(trainer, trainers.WITH, scale.ends[:1], trainers.run_times, 40)
    yield from lines("scan", "torch", scale.states, scans.times, 8)
    yield from lines("step of a Mamba-1", "torch", scale.ends, mamba, 25)
    yield from lines("step of a Mamba-2", "torch", scale.mamba2_states, mamba2, 12)
    yield from lines("step of a Mamba-2", "mamba-ssm", scale.mamba2_states, mamba2, 40)  # its kernels tune themselves
    yield from lines("step of an LRU", "triton", scale.lru_states, lru, 8)
    yield from lines("step of an LRU", "torch", scale.lru_states, lru, 12)
    yield from lines("step of a Mamba-1", f"triton{steps.COMPILED}", scale.ends, mamba, 60)
    yield from checks("mamba-ssm")
    yield from checks("torch")


def run(session: Session, wanted: list[Figure]) -> str:
    """Measure what is missing and fits into the time.

    Returns:
        The table, under card and versions.
    """
    workers = {figure.worker for figure in session.missing(wanted) if figure.needs <= session.left}
    try:
        session.start(sorted(workers))
        if "triton" in workers:
            limit = min(SECONDS_OF_CACHE, session.left / 2)
            session.take(CACHE, lambda: cache.build(session.scale, limit))
        session.run(wanted)
    finally:
        session.close()
    versions = ", ".join(f"{kind} {text}" for kind, text in session.machine.items())
    return f"{versions}\n\n{table(CACHE, wanted, session.found())}\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT", "runs")) / "gpu.jsonl"
    parser.add_argument("--results", type=Path, default=default, help="file of JSON lines (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="figures by the names that are printed, with * and ?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on the CPU too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; a figure that failed is a line of the table."""
    args = parse(arguments)
    if args.device != "cuda" and not args.smoke:
        sys.exit("This benchmark needs a CUDA device and found none; --smoke runs toy sizes on the CPU.")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of the processes: a Trainer would spread over all GPUs
    scale = (toy if args.smoke else full)(args.device)
    results = Results(args.results.parent, args.results.name)
    session = Session(results, hardware(args.device), scale, args.budget)
    wanted = [f for f in figures(scale) if not args.only or any(fnmatch(f.name, text) for text in args.only)]
    text = run(session, wanted)
    args.results.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}", end="")


if __name__ == "__main__":
    main()
