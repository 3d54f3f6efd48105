"""The number of states to keep.

| word | meaning |
|---|---|
| sigma | Hankel singular values of one layer, descending, non-negative |
| energy | plain sum of sigma, as in arXiv 2510.02823 (not of its squares) |
| tolerance | share of the energy that a cut may discard, 0 <= tolerance < 1 |
| count | how many values of sigma are kept; the caller turns counts into states |
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def count_by_tolerance(sigma: Tensor, tolerance: float) -> int:
    """The smallest count whose discarded energy is at most `tolerance` of the total.

    A state is kept while the energy from it on to the end exceeds the allowance; both come from one cumulative sum,
    so that round-off cannot discard everything. Zero energy and `tolerance=0` keep all; NaN keeps all.
    """
    tail = tail_sums(sigma)
    if not tolerance > 0 or not bool(torch.isfinite(tail[0])) or float(tail[0]) <= 0:
        return sigma.numel()
    return max(int((tail[:-1] > tolerance * tail[0]).sum()), 1)


def count_by_error(errors: Tensor, max_error: float) -> int:
    """The smallest count, at least 1, whose error is at most `max_error`.

    Args:
        errors: `(n + 1,)`, error after keeping 0 .. n values, not increasing; NaN keeps all, and so does an error of
            zero after keeping none, since there is no output to compare with.
        max_error: in the unit of `errors`.
    """
    if not float(errors[0]) > 0:
        return errors.numel() - 1
    too_large = ~(errors <= max_error)
    return max(min(int(too_large.sum()), errors.numel() - 1), 1)


def tail_sums(sigma: Tensor) -> Tensor:
    """`sum_{i >= k} sigma_i` for k = 0 .. n, summed from the smallest up, float64 `(n + 1,)`."""
    values = torch.cat([sigma.double(), sigma.new_zeros(1, dtype=torch.float64)])
    return values.flip(0).cumsum(0).flip(0)


def allowed_sizes(size: int, multiple: int = 1, minimum: int = 1, listed: Sequence[int] | None = None) -> list[int]:
    """The state sizes that a layer of `size` states may have after a cut, ascending; the last is `size` itself.

    Args:
        size: present size, which is always allowed.
        multiple: smaller sizes are multiples of this,
        minimum: at least this,
        listed: and among these, if given.
    """
    smaller = range(multiple, size, multiple) if listed is None else sorted(set(listed))
    return [each for each in smaller if each % multiple == 0 and minimum <= each < size] + [size]


def round_size(wanted: float, allowed: Sequence[int]) -> int:
    """The smallest allowed state size that is at least `wanted`; the largest allowed one if none is.

    Args:
        wanted: number of states, may be fractional.
        allowed: as `allowed_sizes` gives them.
    """
    needed = wanted - 1e-9  # 0.1 * 30 is 3.0000000000000004
    return next((size for size in allowed if size >= needed), allowed[-1])


def passes_gate(size: int, new_size: int, min_reduction: float) -> bool:
    """Whether a cut is large enough to be worth it: it removes at least the share `min_reduction` of the states."""
    return new_size < size and (size - new_size) >= min_reduction * size
