"""Whole training steps of models with a delta rule, with `enable_fast_selective_scan` against stock transformers.

Two layers of hidden size 256 with 4 heads of 128 values (Kimi delta attention has values as long as its keys), at
several key sizes; batch 2, length 512, float32, forward, backward and AdamW. The best of several, each in a process of
its own, in turns.

    python examples/benchmarks/delta_rule.py
"""

import argparse
from collections.abc import Callable

import torch
from measuring import HEADER, Row, best_seconds, in_own_process, machine, peak_memory, show
from transformers import AutoModelForCausalLM, KimiLinearConfig, PreTrainedConfig, Qwen3NextConfig

from hf_compressm import enable_fast_selective_scan


GOAL = 3  # times faster
COMMON = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention"] * 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


def make_config(rule: str, key_size: int) -> PreTrainedConfig:
    """A Qwen3-Next whose decay is one number per head, or a Kimi Linear, whose decay is one per key channel."""
    if rule == "gated delta net":
        return Qwen3NextConfig(
            **COMMON,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
            linear_key_head_dim=key_size,
            linear_value_head_dim=128,
            mlp_only_layers=[0, 1],
        )
    return KimiLinearConfig(
        **COMMON, linear_num_heads=4, linear_head_dim=key_size, mlp_layer_types=["dense"] * 2, num_attention_heads=4
    )


def work(peer: str, rule: str, key_size: int, batch: int, length: int) -> Callable[[], None]:
    """One training step."""
    if peer == "ours":
        enable_fast_selective_scan()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(rule, key_size)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(3, 256, (batch, length))

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def measure(peer: str, rule: str, key_size: int, repeats: int, batch: int, length: int) -> tuple[float, float]:
    """Seconds, the best of several, and the peak memory in MiB."""
    return best_seconds(work(peer, rule, key_size, batch, length), repeats), peak_memory()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key_sizes", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--rounds", type=int, default=3, help="how often each pair is measured, for the spread")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args()
    shape = (1, 32) if options.smoke else (2, 512)
    print(f"{machine()}\n\n{HEADER}")
    for rule in ("gated delta net", "Kimi delta attention"):
        for size in options.key_sizes:
            pairs = [
                [in_own_process(measure, peer, rule, size, 5, *shape) for peer in ("ours", "stock")]
                for _ in range(options.rounds)
            ]
            ours, stock = ([figures[i] for figures in pairs] for i in range(2))
            peaks = (show(min(peak for _, peak in peer), "MiB") for peer in (ours, stock))
            row = Row(
                "peak memory",
                f"step of a {rule}, key size {size}",
                [seconds for seconds, _ in ours],
                {"stock": [seconds for seconds, _ in stock]},
                {"stock": GOAL},
                note="{} with this package, {} without".format(*peaks),
            )
            print("\n".join(row.lines()), flush=True)


if __name__ == "__main__":
    main()
