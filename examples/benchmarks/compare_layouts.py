"""What does a cut cost in each Mamba layout? Excess held-out loss right after it, and for Mamba-2 after more steps.

One model per layout is trained briefly on text; copies of it are cut by plain ranking without repair (at random, by
state energy) and as this package cuts. For Mamba-2 also the time of a step after the cut, against the stock class.

    python examples/benchmarks/compare_layouts.py                    # Python's standard library as text
    python examples/benchmarks/compare_layouts.py --layouts mamba2 --more_steps 150 --train_file book.txt
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare_cuts import Batch, cut_text, evaluate, read_tokens, train

from hf_compressm import CompreSSMConfig, compress, enable_fast_selective_scan
from hf_compressm.families import (
    CutMethod,
    MomentTerm,
    NormalizedMambaFamily,
    ParameterChange,
    SSMLayer,
    collect_statistics,
    find_layers,
)
from hf_compressm.families.selective import Selection
from hf_compressm.surgery import commit_replacements, prepare_replacements


STATE_SIZE = 64
SIZES = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "initializer_range": 0.02}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128}
JAMBA = {**ATTENTION, "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1}
ZAMBA = {**ATTENTION, "layers_block_type": ["hybrid", "hybrid"], "n_mamba_heads": 2}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": STATE_SIZE}),
    "falcon_mamba": ("FalconMamba", {"state_size": STATE_SIZE}),
    "jamba": ("Jamba", {**JAMBA, "mamba_d_state": STATE_SIZE, "mamba_dt_rank": 8}),
    "zamba": ("Zamba", {**ZAMBA, "mamba_d_state": STATE_SIZE, "mamba_dt_rank": 8}),
    "mamba2": ("Mamba2", {"state_size": STATE_SIZE, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 64}),
}


class Unrepaired(NormalizedMambaFamily):
    """A normalised layer whose norms' weights are cut like everything else."""

    def _scale_changes(self, layer: SSMLayer, indices: Tensor, *fits: Any) -> list[ParameterChange]:
        norms = {name: getattr(layer.module, name).weight for name in ("b_layernorm", "c_layernorm")}
        return [
            ParameterChange(f"{layer.name}.{name}.weight", weight, weight[indices], (MomentTerm(weight, indices, 0),))
            for name, weight in norms.items()
            if isinstance(weight, torch.nn.Parameter)
        ]


def build(layout: str, state_size: int = STATE_SIZE) -> PreTrainedModel:
    """A two-layer byte-level model."""
    prefix, own = LAYOUTS[layout]
    sizes = {key: state_size if key in ("state_size", "mamba_d_state") else value for key, value in own.items()}
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **sizes, "use_cache": False})
    return getattr(transformers, f"{prefix}ForCausalLM")(config)


def select(model: PreTrainedModel, size: int, rank: Callable[[Selection], Tensor], calibration: list[Batch]) -> None:
    """Keep the states that `rank` wants most, in place, and repair nothing; `config` is not rewritten."""
    layers = find_layers(model)
    methods = [CutMethod(layer.family.criterion("auto", calibrated=True)) for layer in layers]
    collected = collect_statistics(model, layers, methods, calibration)
    for layer, method, seen in zip(layers, methods, collected, strict=True):
        adapter = layer.family
        measured = adapter.measure(layer, method, seen)
        if isinstance(adapter, NormalizedMambaFamily):
            adapter = Unrepaired(**{item.name: getattr(adapter, item.name) for item in fields(adapter)})
        found: Selection = measured.detail
        plain = Selection(rank(found), found.P, found.Q, reads_out=False, samples=found.samples)
        cut = adapter.cut(layer, method, copy_with(measured, plain), size)
        commit_replacements(prepare_replacements(model, cut.changes), cut.attributes)


def copy_with(measurement: Any, detail: Selection) -> Any:
    """The measurement with another selection."""
    other = copy.copy(measurement)
    object.__setattr__(other, "detail", detail)
    return other


def by_energy(found: Selection) -> Tensor:
    """States by `P_ii Q_ii`, group by group."""
    energies = found.P.diagonal(dim1=1, dim2=2) * found.Q.diagonal(dim1=1, dim2=2)
    return energies.argsort(dim=-1, descending=True)


def at_random(found: Selection) -> Tensor:
    """States in one random order per group."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(row.shape[0], generator=generator) for row in found.orders])


def cutters(layout: str, calibration: list[Batch]) -> dict[str, Callable[[PreTrainedModel, int], Any]]:
    """Ways to cut a model in place."""

    def chosen(compat: str) -> Callable[[PreTrainedModel, int], Any]:
        return lambda model, size: compress(model, CompreSSMConfig(target_state_size=size, compat=compat), calibration)

    ways: dict[str, Callable[[PreTrainedModel, int], Any]] = {
        "random": lambda model, size: select(model, size, at_random, calibration),
        "energy": lambda model, size: select(model, size, by_energy, calibration),
        "chosen": chosen("stock"),
    }
    return ways | ({"chosen, best": chosen("best")} if layout == "mamba2" else {})


def compare(layout: str, args: argparse.Namespace, batch: Callable[[], Batch], held_out: list[Batch]) -> None:
    """Train one model, and print the excess loss of every cut of it."""
    torch.manual_seed(args.seed)
    model = build(layout)
    train(model, batch, args.steps, args.learning_rate)
    before = evaluate(model, held_out)
    ways = cutters(layout, [batch() for _ in range(4)])
    print(f"\n{layout}: held-out loss {before:.4f} before the cut\n\n| kept of {STATE_SIZE} | {' | '.join(ways)} |")
    print("|---" * (len(ways) + 1) + "|")
    for share in (2, 4, 8):
        row = []
        for cut in ways.values():
            smaller = copy.deepcopy(model)
            cut(smaller, STATE_SIZE // share)
            entry = f"{evaluate(smaller, held_out) - before:+.4f}"
            if args.more_steps and share > 2:
                train_on_same_data(smaller, args, batch)
                entry += f", then {evaluate(smaller, held_out) - before:+.4f}"
            row.append(entry)
        print(f"| {STATE_SIZE // share} | {' | '.join(row)} |", flush=True)
    if layout == "mamba2":
        compare_speed(model, ways["chosen, best"], batch())


def train_on_same_data(model: PreTrainedModel, args: argparse.Namespace, batch: Callable[[], Batch]) -> None:
    """Further steps, on the same batches for every model."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 1)
        train(model, batch, args.more_steps, args.learning_rate / 2)


def compare_speed(model: PreTrainedModel, project: Callable[[PreTrainedModel, int], Any], data: Mapping) -> None:
    """Time of a training step of the projected model against the stock class at the same size, step by step."""
    for size in (STATE_SIZE // 2, STATE_SIZE // 8):
        projected = copy.deepcopy(model)
        project(projected, size)
        seconds: dict[str, list[float]] = {"projected": [], "stock": []}
        models = {"projected": projected.train(), "stock": build("mamba2", size).train()}
        for _ in range(25):
            for name, one in models.items():
                start = time.perf_counter()
                one(**data).loss.backward()
                seconds[name].append(time.perf_counter() - start)
        middle = {name: statistics.median(values[3:]) for name, values in seconds.items()}
        print(f"step at {size} states, projected / stock: {middle['projected'] / middle['stock']:.3f}", flush=True)


def main() -> None:
    """Read the command line and print one table per layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--train_file", help="text file; Python's standard library without it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--more_steps", type=int, default=0, help="steps after the cuts to 1/4 and 1/8")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    enable_fast_selective_scan()
    tokens = read_tokens(args.train_file)
    split = int(0.9 * len(tokens))
    generator = torch.Generator().manual_seed(1)
    held_out = [cut_text(tokens[split:], 16, generator=generator) for _ in range(8)]
    for layout in args.layouts:
        compare(layout, args, lambda: cut_text(tokens[:split], args.batch_size, length=128), held_out)


if __name__ == "__main__":
    main()
