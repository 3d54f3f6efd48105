"""The short convolution against torch's: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

import hf_compressm.scans.convolution as convolution
from hf_compressm.scans.convolution import causal_convolution, is_fast_convolution


ROUND_OFF = 1e-12  # float64, four products per entry


def expected_convolution(x, weight, bias, activation):
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0])[..., : x.shape[-1]]
    return y if activation is None else F.silu(y)


@pytest.mark.parametrize("block_entries", [1, 20, 1 << 16])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (3, 4), (4, 4), (13, 4), (13, 1), (13, 2)])
def test_equals_torch(length, taps, bias, activation, block_entries, monkeypatch):
    monkeypatch.setattr(convolution, "BLOCK_ENTRIES", block_entries)
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 5, length), (5, taps), *([(5,)] if bias else [])]
    given = [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    arguments = [*given, *([] if bias else [None]), activation]
    runs = []
    for function in (causal_convolution, expected_convolution):
        out = function(*arguments)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        runs.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    for actual, expected in zip(*runs, strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= ROUND_OFF * max(1, expected.abs().max())


def test_what_it_takes():
    x, weight = torch.zeros(1, 2, 3), torch.zeros(2, 4)
    assert is_fast_convolution(x, weight, activation="swish")
    assert not is_fast_convolution(x, weight, activation="gelu")
    assert not is_fast_convolution(x.bfloat16(), weight)
    assert not is_fast_convolution(x.bfloat16(), weight.bfloat16())
