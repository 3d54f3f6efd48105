"""The forms in which mamba-ssm takes the input and read-out vectors B and C of a selective scan.

| form     | meaning                                  | shape                      |
|----------|------------------------------------------|----------------------------|
| shared   | vary in time, one for all channels       | (batch, N, length)         |
| grouped  | vary in time, one for channels of a group | (batch, groups, N, length) |
| constant | one for each channel, the same at all times | (channels, N)            |
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Group(NamedTuple):
    """Channels side by side that share B and C, and these in the shared form."""

    channels: slice
    B: Tensor
    C: Tensor


def expected_shape(vectors: Tensor | None, batch: int, channels: int, N: int, length: int) -> tuple[int, ...]:
    """The shape that B or C must have, in the form that its number of dimensions tells."""
    if vectors is not None and vectors.dim() == 2:
        return channels, N
    if vectors is not None and vectors.dim() == 4 and vectors.shape[1] > 0 and channels % vectors.shape[1] == 0:
        return batch, vectors.shape[1], N, length
    return batch, N, length


def is_constant(vectors: Tensor) -> bool:
    """Whether B or C is the same at all times."""
    return vectors.dim() == 2


def by_channel(vectors: Tensor, channels: int, length: int) -> Tensor:
    """B or C of any form as (batch or 1, channels or 1, N, length)."""
    if vectors.dim() == 2:
        return vectors[None, :, :, None].expand(-1, -1, -1, length)
    if vectors.dim() == 3:
        return vectors[:, None]
    return vectors.repeat_interleave(channels // vectors.shape[1], dim=1)


def groups(B: Tensor, C: Tensor, channels: int) -> list[Group]:
    """The groups of channels that share both B and C, of which neither is constant."""
    B, C = (vectors[:, None] if vectors.dim() == 3 else vectors for vectors in (B, C))
    count = math.lcm(B.shape[1], C.shape[1])
    size = channels // count
    return [
        Group(slice(j * size, (j + 1) * size), *(vectors[:, j * vectors.shape[1] // count] for vectors in (B, C)))
        for j in range(count)
    ]
