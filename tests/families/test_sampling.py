"""How many rows and steps of a batch a layer is measured on."""

import pytest
import torch

from hf_compressm.families.sampling import sample, sampled


@pytest.mark.parametrize(
    ("shape", "size", "costly", "rows", "every"),
    [
        ((8, 256), 64, True, 2, 2),
        ((9, 256), 32, True, 3, 4),
        ((8, 256), 16, True, 4, 8),
        ((8, 256), 64, False, 4, 4),
        ((7, 1024), 64, True, 4, 16),
        ((4, 1024), 64, True, 2, 8),
        ((3, 1024), 64, True, 2, 8),
        ((1, 4096), 64, True, 1, 16),
        ((8, 256), 512, True, 4, 1),
        ((8, 8), 64, True, 8, 1),
    ],
)
def test_a_quarter_or_half_of_the_rows_or_all(
    shape: tuple[int, int], size: int, costly: bool, rows: int, every: int
) -> None:
    with sampled():
        taken, stride = sample(shape, None, size, costly)
        assert len(torch.zeros(shape)[taken]) == rows
        assert stride == every
    assert sample(shape, None, size, costly) == (slice(None, None, 1), 1)


def test_padding_is_no_sample() -> None:
    mask = torch.zeros(8, 4096)
    mask[:, :256] = 1
    with sampled():
        assert sample((8, 4096), mask, 64, costly=True) == (slice(None, None, 4), 2)
        mask[:, 16:] = 0
        assert sample((8, 4096), mask, 64, costly=True) == (slice(None, None, 1), 1)
