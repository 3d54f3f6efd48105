"""The states of an mLSTM layer, read out, are what the layer of transformers computes."""

import pytest
import torch
from torch import Tensor
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMBackend

from hf_compressm.scans.mlstm import mlstm_states


CLOSE = 1e-4
"""Relative; float32 sums in another order, over a normaliser."""


def signals(length: int, gate: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(2, 3, length, size, generator=generator) for name, size in (("q", 6), ("k", 6))}
    if gate > 0:  # a normaliser of sums that cancel would show its round-off
        drawn = {name: vectors.abs() for name, vectors in drawn.items()}
    drawn["v"] = torch.randn(2, 3, length, 5, generator=generator)
    drawn["igate"] = gate + torch.randn(2, 3, length, generator=generator)
    drawn["fgate"] = 3 + torch.randn(2, 3, length, generator=generator)
    return drawn


def stock(given: dict[str, Tensor], start: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    backend = xLSTMBackend(xLSTMConfig(chunk_size=8))
    names = {"q": "query", "k": "key", "v": "value"}
    first = dict(zip(("c_initial", "n_initial", "m_initial"), start or (None, None, None), strict=True))
    return backend(**{names.get(name, name): value for name, value in given.items()}, **first)


@pytest.mark.parametrize("gate", [-8.0, 0.0, 60.0])
@pytest.mark.parametrize("length", [1, 7, 29])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("goes_on", [False, True])
def test_what_the_states_read_out_is_the_output(gate: float, length: int, every: int, goes_on: bool) -> None:
    start = stock(signals(9, gate, seed=1), None)[1] if goes_on else None
    given = signals(length, gate)
    expected = stock(given, start)[0].permute(2, 0, 1, 3)[every - 1 :: every]  # (steps, batch, heads, head_dim)
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    states = list(mlstm_states(q, k, v, given["igate"], given["fgate"], start, every))
    assert len(states) == length // every
    if not states:
        return
    reads = q.transpose(0, 1)[every - 1 :: every]
    found = torch.einsum("sbhdn,sbhn->sbhd", torch.cat(states), reads)
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()))
