"""The scans on a device that has no float64, for which a mode stands in that refuses it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.scans.test_operators import delta, diagonal, selective, ssd


SINGLE_ROUND_OFF = 1e-3  # sums of logarithms in float32, relative to the largest entry
LENGTH = 70


class NoDouble(TorchDispatchMode):
    """Refuses operations that make a float64 or complex128."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{function} made a {leaf.dtype}, which this device has not")
        return result


@pytest.mark.parametrize("make", [selective, ssd, delta, diagonal])
def test_no_double_precision_is_needed(make, monkeypatch):
    scan, tensors = make(LENGTH)
    out = scan(*tensors)
    expected = [out, *torch.autograd.grad(out.square().sum(), tensors)]
    for module in ("ssd_chunks", "delta_decays"):
        monkeypatch.setattr(f"hf_compressm.scans.{module}.summing_dtype", lambda device: torch.float32)
    with NoDouble():
        out = scan(*tensors)
        actual = [out, *torch.autograd.grad(out.square().sum(), tensors)]
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= SINGLE_ROUND_OFF * other.abs().max()


def test_the_mode_refuses():
    with NoDouble(), pytest.raises(TypeError, match="this device has not"):
        torch.zeros(2).double()
