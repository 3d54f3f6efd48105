"""The states of gated linear attention against the recurrence written out step by step."""

import pytest
import torch
from torch import Tensor

from hf_compressm.scans.linear_attention import linear_states


EXACT = 1e-12
"""Absolute; float64."""
BATCH, LENGTH, HEADS, N, P = 2, 13, 3, 4, 5


def signals() -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and log decays, some of them strong."""
    k, g = (torch.randn(BATCH, LENGTH, HEADS, N).double() for _ in range(2))
    return k, torch.randn(BATCH, LENGTH, HEADS, P).double(), -(3 * g).exp()


def written_out(k: Tensor, v: Tensor, g: Tensor, state: Tensor, texts: Tensor | None) -> Tensor:
    found = []
    for t in range(LENGTH):
        if texts is not None and t:
            goes_on = texts[:, t] == texts[:, t - 1]
            state = state * goes_on.view(-1, 1, 1, 1)
        state = g[:, t, ..., None].exp() * state + torch.einsum("bhn,bhp->bhnp", k[:, t], v[:, t])
        found.append(state)
    return torch.stack(found)


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_states_are_those_of_the_recurrence(every: int, goes_on: bool, packed: bool) -> None:
    k, v, g = signals()
    texts = torch.tensor([[0] * 6 + [1] * 7, [0] * 2 + [1] + [2] * 10]) if packed else None
    first = torch.randn(BATCH, HEADS, N, P).double()
    expected = written_out(k, v, g, first if goes_on else torch.zeros_like(first), texts)[every - 1 :: every]
    found = []
    for states in linear_states(k, v, g, first if goes_on else None, every, texts):
        found.append(states.clone())
        states.zero_()  # a reader may write to them
    assert sum(map(len, found)) == LENGTH // every
    if found:
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=EXACT)
