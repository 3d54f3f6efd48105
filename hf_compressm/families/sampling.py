"""How much of a long batch a layer is measured on: covariances need samples, not every token."""

from torch import Tensor


SAMPLES_PER_STATE = 4
"""A batch with more tokens than so many for each state is sampled: what a layer computes once more costs time."""
LARGEST_STRIDE = 16
STEPS_OF_A_ROW = 32
"""Fewest steps of a row that are looked at: states grow from zero, and those after whole strides are late."""


def sampled_rows(signal: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """Every other row of a batch with many tokens, and the mask of these rows; otherwise all.

    Args:
        signal: `(batch, length, ...)`.
        mask: `(batch, length)`, 1 for real tokens, or None if all are.
        size: states of a channel.
    """
    step = 2 if _count(signal, mask) >= SAMPLES_PER_STATE * size else 1
    return signal[::step], None if mask is None else mask[::step]


def sampling_stride(signal: Tensor, mask: Tensor | None, size: int) -> int:
    """A power of two: of the states of a long batch, those after every so many steps suffice for their covariance.

    Args:
        signal: any signal of the layer, `(batch, length, ...)`.
        mask: `(batch, length)`, 1 for real tokens, or None if all are.
        size: states of a channel.
    """
    enough = min(_count(signal, mask) // (SAMPLES_PER_STATE * size), signal.shape[1] // STEPS_OF_A_ROW, LARGEST_STRIDE)
    return 1 << max(enough.bit_length() - 1, 0)


def _count(signal: Tensor, mask: Tensor | None) -> int:
    """The number of real tokens, so that padding changes nothing."""
    return signal.shape[0] * signal.shape[1] if mask is None else int(mask.sum())
