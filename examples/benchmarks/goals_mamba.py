"""Mamba-1 on a CPU: a training step, its memory, and decoding, against the stock code, mambapy and torch.compile."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import Row, best_seconds, in_own_process, memory, peak_memory
from transformers import MambaConfig, MambaForCausalLM

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.scans import enable_fast_selective_scan


WANTED = {128: {"stock": 150, "mambapy": 20, "compile": 4}, 16: {"stock": 25, "compile": 1.5}}
SLOW = 128  # states from which the stock loop takes minutes: it is run once


def model(state_size: int, mambapy: bool = False, hidden_size: int = 128, layers: int = 2) -> MambaForCausalLM:
    """Two layers of 256 channels, or as asked."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "state_size": state_size, "num_hidden_layers": layers}
    return MambaForCausalLM(MambaConfig(vocab_size=256, use_mambapy=mambapy, **sizes))


def training_step(made: torch.nn.Module, parameters: Any, batch: int, length: int) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(parameters)
    tokens = torch.randint(0, 256, (batch, length))

    def step() -> None:
        optimizer.zero_grad()
        made(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def measure_step(peer: str, state_size: int, repeats: int, batch: int, length: int) -> dict[str, float]:
    """Seconds of a training step, and the memory that it takes beyond the model's."""
    made = model(state_size, mambapy=peer == "mambapy").train()
    if peer.startswith("ours"):
        enable_fast_selective_scan()
    is_compiled = peer.endswith("compile")
    step = training_step(torch.compile(made) if is_compiled else made, made.parameters(), batch, length)
    before = memory()
    start = time.perf_counter()
    step()
    first, peak = time.perf_counter() - start, peak_memory()
    if peer == "stock" and state_size >= SLOW:
        return {"seconds": first, "first": first, "memory": peak - before}
    seconds = best_seconds(step, repeats)
    # What the compiler itself holds counts as the step's: it stays there while training goes on.
    return {"seconds": seconds, "first": first, "memory": max(peak, peak_memory()) - before}


def steps(state_size: int, peers: list[str], rounds: int, batch: int = 8, length: int = 256) -> list[Row]:
    """P1 or P2, P10, and P8 at 128 states: every peer in a process of its own, ours again in every round."""
    compiled = ["ours+compile"] if "compile" in peers else []
    runs: dict[str, list[dict[str, float]]] = {peer: [] for peer in ("ours", *compiled, *peers)}
    for number in range(rounds):
        for peer in runs:
            if number == 0 or peer in ("ours", *compiled, "mambapy"):  # the others take minutes
                runs[peer].append(in_own_process(measure_step, peer, state_size, 5, batch, length))
                print(f"  {state_size} states, {peer}: {runs[peer][-1]}", flush=True)
    seconds = {peer: [run["seconds"] for run in kept] for peer, kept in runs.items()}
    mebibytes = {peer: [run["memory"] for run in kept] for peer, kept in runs.items()}
    rows = []
    for peer in compiled:
        for what, kept, unit in (("time", seconds, "s"), ("memory", mebibytes, "MiB")):
            wanted = {"compile": 5.0} if unit == "MiB" and state_size == SLOW else {}
            work = f"{what} of that step under torch.compile, N={state_size}"
            rows.append(Row("P10", work, kept.pop(peer), {"compile": kept["compile"]}, wanted, unit))
    goal = "P1" if state_size == SLOW else "P2"
    work = f"Mamba-1 step, 256 channels, batch {batch}, length {length}, N={state_size}"
    first = {peer: runs[peer][0]["first"] for peer in (*compiled, "compile") if peer in runs}
    note = "; ".join(f"{peer} took {took:.0f} s before its first step" for peer, took in first.items())
    rows.insert(0, Row(goal, work, seconds.pop("ours"), seconds, WANTED.get(state_size, {}), note=note))
    if state_size == SLOW:
        ours = mebibytes.pop("ours")
        rows.append(Row("P8", f"memory of that step, N={state_size}", ours, mebibytes, {"stock": 10}, "MiB"))
    return rows


def measure_decoding(repeats: int, layers: int, prompt: int = 16) -> dict[str, Any]:
    """Seconds per token and bytes of state, before and after a cut from 128 to 12 states."""
    enable_fast_selective_scan()
    full = model(128, hidden_size=256, layers=layers).eval()
    cut = copy.deepcopy(full)
    tokens = torch.randint(0, 256, (1, prompt))
    compress(cut, CompreSSMConfig(target_state_size=12), [{"input_ids": tokens}])
    result: dict[str, Any] = {}
    for name, made in (("before", full), ("after", cut)):
        with torch.no_grad():
            outputs = made(tokens, use_cache=True)
            name_of_cache = "cache" if "cache" in outputs else "cache_params"  # transformers before 5.24
            cache = outputs[name_of_cache]
            step = {"input_ids": tokens[:, -1:], name_of_cache: cache, "use_cache": True}
            seconds = best_seconds(lambda made=made, step=step: made(**step), repeats, warm_up=3)
        states = [state for layer in cache.layers for state in layer.recurrent_states.values()]
        result[name] = {"seconds": seconds, "bytes": sum(state.numel() * state.element_size() for state in states)}
    return result


def decoding(rounds: int, repeats: int = 50, layers: int = 24) -> list[Row]:
    """P9."""
    runs = [in_own_process(measure_decoding, repeats, layers) for _ in range(rounds)]
    seconds = {name: [run[name]["seconds"] for run in runs] for name in ("before", "after")}
    size = {name: runs[0][name]["bytes"] for name in ("before", "after")}
    note = f"the states of all layers take {size['before']:,} bytes before the cut and {size['after']:,} after it."
    work = f"one token of a Mamba-1 of {layers} layers of 512 channels, N=12 after the cut"
    return [
        Row("P9", work, seconds["after"], {"before, N=128": seconds["before"]}, {"before, N=128": 1.0}, note=note),
        Row("P9", "bytes of state", [size["after"]], {"before": [size["before"]]}, {"before": 128 / 12}, "B"),
    ]
