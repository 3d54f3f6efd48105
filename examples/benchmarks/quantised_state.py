"""Does a cut add to a quantised state? Held-out loss of a decoding whose recurrent state is rounded after every token.

A byte-level Mamba-2 is trained briefly, or loaded, and cut to a half and a quarter of its states; nothing is trained
after the cut. Each model then reads held-out text token by token with its cache, and after each token every layer's
state is rounded to what an engine would keep: bfloat16, or whole numbers with one float32 scale, that of the largest
magnitude, for each row of N states or for each head. Where both damages add up, a column has one figure in all rows.

    python examples/benchmarks/quantised_state.py --seeds 0 1
    python examples/benchmarks/quantised_state.py --model runs/mamba2
"""

import argparse
import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare_cuts import Batch, cut_text, read_tokens, train
from measuring import machine

from hf_compressm import CompreSSMConfig, compress, enable_fast_selective_scan
from hf_compressm.compression import state_cost


STATE_SIZE = 128
ROW, HEAD = (-1,), (-2, -1)
"""Axes of a state `(batch, heads, channels, N)` that have one scale together."""


def rounded(state: Tensor, bits: int, axes: tuple[int, ...]) -> Tensor:
    """The nearest of the `2^bits - 1` whole multiples of a scale, which maps the largest magnitude to the last one."""
    last = 2 ** (bits - 1) - 1
    scale = state.abs().amax(axes, keepdim=True).clamp_min(1e-30) / last
    return (state / scale).round().clamp(-last, last) * scale


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda state: state,
    "bfloat16": lambda state: state.bfloat16().to(state.dtype),
    "int8, rows": partial(rounded, bits=8, axes=ROW),
    "int8, heads": partial(rounded, bits=8, axes=HEAD),
    "int4, rows": partial(rounded, bits=4, axes=ROW),
}


def build(smoke: bool) -> PreTrainedModel:
    """A two-layer byte-level Mamba-2."""
    width = 16 if smoke else 128
    sizes = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": 2, "n_groups": 1, "chunk_size": 64}
    config = Mamba2Config(**sizes, state_size=STATE_SIZE, num_heads=width // 16, head_dim=32)
    return Mamba2ForCausalLM(config)


def round_states(cache: Cache, rounding: Callable[[Tensor], Tensor]) -> None:
    """Round the recurrent states of all layers in place; attention layers have none."""
    for layer in cache.layers:
        states = getattr(layer, "recurrent_states", {})
        for state in states.values() if isinstance(states, dict) else [states]:
            state.copy_(rounding(state))


@torch.no_grad()
def decoded_loss(model: PreTrainedModel, tokens: Tensor, rounding: Callable[[Tensor], Tensor]) -> float:
    """Mean loss of each next token, of rows `(batch, length)` that are read token by token."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "cache_params"  # before 5.24
    total, given = 0.0, {}
    for position in range(tokens.shape[1] - 1):
        outputs = model(input_ids=tokens[:, position : position + 1], use_cache=True, **given)
        given = {name: outputs[name]}
        round_states(outputs[name], rounding)
        total += float(nn.functional.cross_entropy(outputs.logits[:, -1], tokens[:, position + 1]))
    return total / (tokens.shape[1] - 1)


def compare(model: PreTrainedModel, sizes: list[int], calibration: list[Batch], held_out: Tensor) -> None:
    """Print a row for each size: the loss with a float32 state, and what each rounding adds to it."""
    columns = list(ROUNDINGS)[1:]
    print(f"| states | bytes of a sequence, float32 | int8 | loss | {' | '.join(f'+ {name}' for name in columns)} |")
    print("|" + "---|" * (len(columns) + 4))
    for size in sizes:
        cut = copy.deepcopy(model)
        if size < model.config.state_size:
            compress(cut, CompreSSMConfig(target_state_size=size), calibration)
        cost = state_cost(cut)
        losses = {name: decoded_loss(cut.eval(), held_out, rounding) for name, rounding in ROUNDINGS.items()}
        added = " | ".join(f"{losses[name] - losses['float32']:+.4f}" for name in columns)
        figures = f"{cost.recurrent_bytes(4):,} | {cost.recurrent_bytes(1):,} | {losses['float32']:.4f}"
        print(f"| {size} | {figures} | {added} |", flush=True)


def main() -> None:
    """Train or load, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a trained byte-level model, instead of training one")
    parser.add_argument("--train_file", help="text; by default Python's standard library")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--length", type=int, default=512, help="tokens of each held-out row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    args = parser.parse_args()
    enable_fast_selective_scan()
    tokens = read_tokens(args.train_file)
    split = int(0.9 * len(tokens))
    steps, rows, length = (2, 2, 8) if args.smoke else (args.steps, 32, args.length)
    generator = torch.Generator().manual_seed(1)
    held_out = cut_text(tokens[split:], rows, length, generator)["input_ids"]
    print(f"{machine()}; {rows} held-out rows of {length} tokens\n")
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else build(args.smoke)
        if not args.model:
            train(model, lambda: cut_text(tokens[:split], 8), steps, args.learning_rate)
        calibration = [cut_text(tokens[:split], 8) for _ in range(4)]
        present = model.config.state_size
        print(f"\nseed {seed}")
        compare(model, [present, present // 2, present // 4], calibration, held_out)


if __name__ == "__main__":
    main()
