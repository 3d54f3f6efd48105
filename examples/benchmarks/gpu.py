"""Training on a GPU before and after cuts: Mamba with mamba-ssm's kernels and ours, LRU with and without Triton.

Tokens per second of whole training steps (forward, backward, AdamW), best of several, each in a process of its own:

- Mamba-1 in the shape of mamba-130m (24 layers, 1536 channels), batch 8, length 1024, at N = 128, 64, 32, 16 and 12,
  in bfloat16 autocast: as `transformers` runs it where mamba-ssm's kernels work, and with the scan of this package;
- LRU in the shape of the paper's sCIFAR (6 layers, N=384, H=512, length 1024, batch 50) and cut to 96 states, in
  float32, with the Triton kernels and with the loop. The paper's own speed-up from this cut on is 1.5.

Needs a CUDA device; `--smoke` runs toy sizes on whatever there is.

    python examples/benchmarks/gpu.py
"""

import argparse
import sys
from typing import Any

import torch
from measuring import best_seconds, in_own_process, machine
from transformers import MambaConfig, MambaForCausalLM

from hf_compressm import LRUConfig, LRUForSequenceClassification, enable_fast_selective_scan
from hf_compressm.scans import boundary, kernels


Shape = dict[str, int]
MAMBA = {"layers": 24, "hidden": 768, "vocabulary": 50280, "batch": 8, "length": 1024}
LRU = {"layers": 6, "hidden": 512, "batch": 50, "length": 1024}
TOY = {"layers": 1, "hidden": 8, "vocabulary": 16, "batch": 2, "length": 32}
MAMBA_SIZES, LRU_SIZES = [128, 64, 32, 16, 12], [384, 96]


def without(way: str) -> None:
    """Leave out what the other way uses: a process has one way only."""
    if way == "ours":  # as if mamba-ssm were not there
        kernels.working_devices = lambda kernel: frozenset()  # type: ignore[assignment]
    if way == "loop":
        boundary.KERNEL_DEVICES = frozenset()  # type: ignore[misc]


def mamba(state_size: int, device: str, shape: Shape) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A language model and its batch."""
    sizes = {"hidden_size": shape["hidden"], "num_hidden_layers": shape["layers"], "vocab_size": shape["vocabulary"]}
    model = MambaForCausalLM(MambaConfig(state_size=state_size, **sizes))
    tokens = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]), device=device)
    return model, {"input_ids": tokens, "labels": tokens}


def lru(state_size: int, device: str, shape: Shape) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A classifier of images read pixel by pixel, and its batch."""
    sizes = {"hidden_size": shape["hidden"], "num_hidden_layers": shape["layers"], "state_size": state_size}
    model = LRUForSequenceClassification(LRUConfig(input_size=3, num_labels=10, norm="batch", dropout=0.1, **sizes))
    pixels = torch.randn(shape["batch"], shape["length"], 3, device=device)
    return model, {"input_values": pixels, "labels": torch.randint(0, 10, (shape["batch"],), device=device)}


def measure(
    family: str, way: str, state_size: int, device: str, shape: Shape, repeats: int, trial: bool = False
) -> dict[str, Any]:
    """Tokens per second and peak memory of a training step, or only whether the kernels of that way work."""
    works = {
        "kernels": lambda: device in kernels.working_devices(kernels.INNER),
        "triton": lambda: boundary.has_kernel(torch.device(device), torch.complex64),
    }
    if trial:
        return {"works": works.get(way, lambda: True)()}
    without(way)
    enable_fast_selective_scan()
    torch.manual_seed(0)
    model, batch = (mamba if family == "mamba" else lru)(state_size, device, shape)
    optimizer = torch.optim.AdamW(model.to(device).train().parameters())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=family == "mamba"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device

    seconds = best_seconds(step, repeats, warm_up=3)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float("nan")
    return {"tokens": shape["batch"] * shape["length"] / seconds, "memory": peak}


def report(family: str, way: str, sizes: list[int], options: argparse.Namespace) -> None:
    """A row per size, with the speed-up over the largest."""
    shape = TOY if options.smoke else {"mamba": MAMBA, "lru": LRU}[family]

    def run(size: int, trial: bool = False) -> dict[str, Any]:
        return in_own_process(measure, family, way, size, options.device, shape, options.repeats, trial)

    if not run(sizes[0], trial=True)["works"]:
        print(f"| {family}, {way} | does not work here | | | |", flush=True)
        return
    first = 0.0
    for size in sizes:
        found = run(size)
        first = first or found["tokens"]
        cells = f"{found['tokens']:,.0f} | {found['tokens'] / first:.2f} | {found['memory']:,.0f} MiB"
        print(f"| {family}, {way} | {size} | {cells} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", nargs="+", default=["mamba", "lru"], choices=["mamba", "lru"])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on the CPU too")
    options = parser.parse_args()
    if options.device != "cuda" and not options.smoke:
        sys.exit("This benchmark needs a CUDA device and found none; --smoke runs toy sizes on the CPU.")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    print(f"{name}; {machine()}\n\n| work | N | tokens/s | speed-up over the first N | peak of memory |")
    print("|---|---|---|---|---|")
    for way in ("kernels", "ours") if "mamba" in options.families else ():
        report("mamba", way, MAMBA_SIZES[-2:] if options.smoke else MAMBA_SIZES, options)
    for way in ("triton", "loop") if "lru" in options.families else ():
        report("lru", way, [8, 4] if options.smoke else LRU_SIZES, options)


if __name__ == "__main__":
    main()
