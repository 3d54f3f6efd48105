"""Whole training steps: forward, backward and fused AdamW, in bfloat16 autocast but for LRU."""

import time
from typing import Any

import torch
from gpu_session.scale import Scale
from gpu_session.timing import milliseconds, peak_memory
from gpu_session.ways import reason_against
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import LRUConfig, LRUForSequenceClassification


COMPILED = ", compiled"
"""What the name of a way ends with under `torch.compile`."""


def mamba(size: int, scale: Scale) -> nn.Module:
    """In the shape of state-spaces/mamba-130m."""
    sizes = {"hidden_size": scale.hidden, "num_hidden_layers": scale.layers, "vocab_size": scale.vocabulary}
    return MambaForCausalLM(MambaConfig(state_size=size, use_cache=False, **sizes))


def mamba2(size: int, scale: Scale) -> nn.Module:
    """In the shape of state-spaces/mamba2-130m."""
    sizes = {"hidden_size": scale.hidden, "num_hidden_layers": scale.layers, "vocab_size": scale.vocabulary}
    heads = {"head_dim": scale.head_dim, "num_heads": 2 * scale.hidden // scale.head_dim, "n_groups": 1}
    return Mamba2ForCausalLM(
        Mamba2Config(state_size=size, use_cache=False, tie_word_embeddings=True, **sizes, **heads)
    )


def lru(size: int, scale: Scale) -> nn.Module:
    """A classifier of pictures read pixel by pixel."""
    layers, hidden, _, _ = scale.lru
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "state_size": size}
    return LRUForSequenceClassification(LRUConfig(input_size=3, num_labels=10, norm="batch", dropout=0.1, **sizes))


def tokens(scale: Scale) -> dict[str, Tensor]:
    """A batch for a language model."""
    drawn = torch.randint(0, scale.vocabulary, (scale.batch, scale.length), device=scale.device)
    return {"input_ids": drawn, "labels": drawn}


def pixels(scale: Scale) -> dict[str, Tensor]:
    """A batch for a classifier."""
    _, _, batch, length = scale.lru
    drawn = torch.randn(batch, length, 3, device=scale.device)
    return {"input_values": drawn, "labels": torch.randint(0, 10, (batch,), device=scale.device)}


FAMILIES = {"mamba": (mamba, tokens), "mamba2": (mamba2, tokens), "lru": (lru, pixels)}


def step_times(way: str, size: int, scale: Scale, family: str) -> dict[str, Any]:
    """Milliseconds of a training step, tokens per second, the peak of memory; when compiled, seconds of the first."""
    base = way.removesuffix(COMPILED)
    absent = reason_against(base, family, scale.device)
    if absent:
        return {"absent": absent}
    torch.manual_seed(0)
    build, draw = FAMILIES[family]
    with torch.device("cpu" if family == "lru" else scale.device):  # language models are large: drawn where they run
        model = build(size, scale)
    model = model.to(scale.device).train()
    batch = draw(scale)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if way != base:
        model.compile(backend=scale.compiler)

    def step() -> None:
        with torch.autocast(scale.device, torch.bfloat16, enabled=family != "lru"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    start = time.perf_counter()
    step()
    first = {} if way == base else {"first step": time.perf_counter() - start}
    median = milliseconds(step, scale.device, 2 if base == "torch" else scale.repeats, warm_up=1)
    steps = batch["labels"].shape[0] * (scale.lru[3] if family == "lru" else scale.length)
    return {"milliseconds": median, "tokens": 1000 * steps / median, "peak": peak_memory(scale.device)} | first
