"""What does a cut cost a large model on several GPUs? Bytes over the network, and seconds, worked out from one layer.

The whole model is built without memory, for its number of parameters. One SSM layer of the real width is built, run on
calibration data, planned and cut with its AdamW moments, on this machine's CPU; all layers of a model have the same
shapes, so that bytes and seconds of a cut are those of a layer times their number.

    python examples/benchmarks/cost_of_cuts.py                       # Mamba-2.8B, and Nemotron-H-8B's 52 layers
    python examples/benchmarks/cost_of_cuts.py --models mamba-2.8b --length 2048
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import MambaConfig, NemotronHConfig, PreTrainedConfig

from hf_compressm import CompreSSMConfig, apply_plan, enable_fast_selective_scan, plan_compression
from hf_compressm.compression import check_settings
from hf_compressm.families import collect_statistics, find_layers
from hf_compressm.surgery import skeleton
from hf_compressm.utils.processes import dump


KINDS = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"  # of nvidia/Nemotron-H-8B-Base-8K's config.json


def mamba(layers: int, vocab_size: int) -> MambaConfig:
    """state-spaces/mamba-2.8b-hf."""
    return MambaConfig(hidden_size=2560, state_size=16, num_hidden_layers=layers, vocab_size=vocab_size)


def nemotron_h(layers: int, vocab_size: int) -> NemotronHConfig:
    """nvidia/Nemotron-H-8B-Base-8K: 24 Mamba-2 layers, 24 MLPs, 4 attention layers."""
    kinds = [KINDS[letter] for letter in NEMOTRON_H_8B[:layers]]
    sizes = {"hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 8}
    ssm = {"ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8}
    return NemotronHConfig(layers_block_type=kinds, vocab_size=vocab_size, **sizes, **ssm)


MODELS: dict[str, tuple[Callable[[int, int], PreTrainedConfig], int, int, str]] = {
    "mamba-2.8b": (mamba, 64, 50280, "MambaForCausalLM"),
    "nemotron-h-8b": (nemotron_h, 52, 131072, "NemotronHForCausalLM"),
}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure(name: str, length: int, batches: int) -> dict[str, float]:
    """Bytes and seconds of halving the state of one layer, and sizes of the whole model."""
    make, layers, vocab_size, class_name = MODELS[name]
    model_class = getattr(transformers, class_name)
    whole = skeleton(model_class, make(layers, vocab_size))
    whole.tie_weights()
    torch.manual_seed(0)
    model = model_class(make(1, 256)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    config = CompreSSMConfig(fraction=0.5, refit_steps=0)  # as where training goes on after the cut
    data: Any = [{"input_ids": torch.randint(256, (1, length)), "use_cache": False} for _ in range(batches)]
    (choice,) = check_settings(model, config, calibrated=True)
    layer, method = choice.layer, choice.method
    (seen,), calibration = timed(lambda: collect_statistics(model, [layer], [method], data))
    measurement, measuring = timed(lambda: layer.family.measure(layer, method, seen))
    _, cutting = timed(lambda: layer.family.cut(layer, method, measurement, layer.state_size // 2))
    plan = plan_compression(model, config, data)
    sent = len(dump(plan, model))
    _, writing = timed(lambda: apply_plan(model, plan, optimizer))
    return {
        "parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "layers": len(find_layers(whole)),
        "reduced": sum(value.numel() * 8 for value in seen.sums.values()),
        "samples": sum(rows.numel() * 8 for parts in seen.samples.values() for rows in parts),
        "sent": sent,
        "calibration": calibration,
        "planning": measuring + cutting,
        "writing": writing,
    }


def report(name: str, row: dict[str, float], length: int, batches: int) -> None:
    """Print a row of the table, times the number of layers."""
    layers, gradients = row["layers"], 4 * row["parameters"]
    print(
        f"\n{name}: {row['parameters'] / 1e9:.2f} billion parameters, {layers:.0f} SSM layers; per cut of all layers:"
    )
    print(f"  reduced to the first process  {layers * row['reduced'] / 2**20:10.2f} MiB from each process")
    print(f"  samples gathered              {layers * row['samples'] / 2**20:10.2f} MiB in all")
    print(f"  plan sent to each process     {layers * row['sent'] / 2**20:10.1f} MiB")
    share = layers * (row["reduced"] + row["samples"] + row["sent"]) / gradients
    print(f"  all of it, in float32 gradients of one step: {share:.5f}")
    print(
        f"  calibration {layers * row['calibration']:8.1f} s on this CPU ({batches} x {length} tokens, in one process)"
    )
    print(f"  planning    {layers * row['planning']:8.1f} s, by the first process")
    print(f"  writing     {layers * row['writing']:8.1f} s, weights and moments, in each process")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration batch of one sequence")
    parser.add_argument("--batches", type=int, default=4, help="calibration batches")
    arguments = parser.parse_args()
    enable_fast_selective_scan()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.models:
        report(name, measure(name, arguments.length, arguments.batches), arguments.length, arguments.batches)


if __name__ == "__main__":
    main()
