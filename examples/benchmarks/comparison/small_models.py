"""The models of the benchmarks of single cuts: a few layers of one kind, without anything that is not measured."""

import math
from typing import Any

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from hf_compressm.families import find_layers


ENDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
START = {"initializer_range": 0.1}
STEP_SIZES = (1e-3, 1e-1)
"""Of the decay at the start, spread evenly in their logarithm as fla does: transformers' own forget within a token."""
HEAD_DIM = 32


def delta_net(channels: int, hidden: int, vocab_size: int) -> PreTrainedModel:
    """Two layers of Qwen3.5's gated delta net with so many channels in a key head, and no attention."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": hidden // 2}
    unused = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "linear_key_head_dim": channels}
    sizes |= {"vocab_size": vocab_size}
    model = Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(**heads, **unused, **layers, **sizes, **ENDS, **START, use_cache=False)
    )
    for layer in find_layers(model):
        steps = torch.empty_like(layer.module.dt_bias).uniform_(*map(math.log, STEP_SIZES)).exp()
        layer.module.dt_bias.data = steps + torch.log(-torch.expm1(-steps))
    return model


def mamba2(states: int, hidden: int, vocab_size: int, layers: int = 4) -> PreTrainedModel:
    """Layers of Mamba-2, one group of states in each."""
    heads = {"num_heads": 2 * hidden // HEAD_DIM, "head_dim": HEAD_DIM, "n_groups": 1}
    sizes: dict[str, Any] = {"hidden_size": hidden, "state_size": states, "num_hidden_layers": layers}
    sizes |= {"vocab_size": vocab_size, "chunk_size": 64}
    return Mamba2ForCausalLM(Mamba2Config(**heads, **sizes, **ENDS, use_cache=False))


def hybrid(states: int, hidden: int, vocab_size: int, layers: int = 4) -> PreTrainedModel:
    """Bamba: layers of Mamba-2 with two groups, each with an MLP behind it, and one layer of attention."""
    heads = {"mamba_n_heads": 2 * hidden // HEAD_DIM, "mamba_d_head": HEAD_DIM, "mamba_n_groups": 2}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [layers // 2]}
    sizes: dict[str, Any] = {"hidden_size": hidden, "mamba_d_state": states, "num_hidden_layers": layers + 1}
    sizes |= {"vocab_size": vocab_size, "intermediate_size": 2 * hidden, "mamba_chunk_size": 64}
    return BambaForCausalLM(BambaConfig(**heads, **attention, **sizes, **ENDS, use_cache=False))
