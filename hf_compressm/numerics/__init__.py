"""State-space mathematics in float64 and complex128; depends on torch alone."""

from hf_compressm.numerics.balancing import (
    BalancedTruncation,
    Balancing,
    balance,
    balanced_truncation,
    hankel_singular_values,
    truncate,
)
from hf_compressm.numerics.gramians import gramians, h2_norm, relative_h2_error
from hf_compressm.numerics.systems import DiagonalSystem


__all__ = [
    "BalancedTruncation",
    "Balancing",
    "DiagonalSystem",
    "balance",
    "balanced_truncation",
    "gramians",
    "h2_norm",
    "hankel_singular_values",
    "relative_h2_error",
    "truncate",
]
