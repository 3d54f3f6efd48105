"""The recurrence of Mamba-3 against one written out step by step."""

import pytest
import torch
from torch import Tensor

from hf_compressm.scans.trapezoidal import rotated, trapezoidal_states
from tests.blocks.mamba3 import angle_sums, by_head, turned


EXACT = 1e-12
"""Absolute; float64."""


def steps(heads: int = 4, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """ADT, DT and the trapezoid's weight before its sigmoid."""
    DT = torch.rand(2, heads, length).double()
    return -torch.rand(2, heads, length).double() * DT, DT, torch.randn(2, heads, length).double()


@pytest.mark.parametrize("angles", [1, 3])
def test_the_first_pairs_of_every_head_turn(angles: int) -> None:
    vectors, bias = torch.randn(2, 9, 2, 6).double(), torch.randn(4, 6).double()
    rates, DT = torch.randn(2, 9, 4, angles).double(), steps()[1]
    expected = turned(by_head(vectors, 4) + bias, angle_sums(rates, DT), neighbours=True)
    torch.testing.assert_close(rotated(vectors, bias, rates, DT), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_present_input_and_the_last_one_are_weighted(every: int) -> None:
    v, k = torch.randn(2, 9, 4, 3).double(), torch.randn(2, 9, 4, 6).double()
    ADT, DT, trap = steps()
    h, expected = torch.zeros(2, 4, 3, 6).double(), []
    for t in range(9):
        alpha, weight, step = (each[..., t, None, None] for each in (ADT.exp(), trap.sigmoid(), DT))
        h = alpha * h + step * weight * torch.einsum("bhp,bhn->bhpn", v[:, t], k[:, t])
        if t:
            h = h + alpha * step * (1 - weight) * torch.einsum("bhp,bhn->bhpn", v[:, t - 1], k[:, t - 1])
        expected.append(h)
    found = []
    for states in trapezoidal_states(v, k, ADT, DT, trap, every):
        found.append(states.clone())
        states.zero_()  # a reader may write to them
    torch.testing.assert_close(torch.cat(found), torch.stack(expected[every - 1 :: every]), rtol=0, atol=EXACT)
