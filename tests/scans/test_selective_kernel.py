"""What the Triton kernels of the selective scan are compared with when they are tried."""

import pytest
import torch

from hf_compressm.scans.selective_kernel import DTYPES, TRIAL


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_does_not_blur_what_kernels_are_compared_with(dtype):
    sharp = TRIAL.results(None, torch.device("cpu"), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = TRIAL.results(None, torch.device("cpu"), dtype)
    assert all(torch.equal(one, other) for one, other in zip(found, sharp, strict=True))
    assert all(tensor.dtype == torch.float64 for tensor in sharp)  # which TF32 spares too
