"""Moment terms of parameters that hold complex numbers."""

from dataclasses import dataclass

from hf_compressm.families.changes import MomentTerm


@dataclass(frozen=True, eq=False)
class ComplexTerm(MomentTerm):
    """A summand whose map mixes real and imaginary parts.

    The source is complex, or real with `[Re, Im]` as its last axis. `matrix` is float64 `(2 new, 2 old)` and maps
    `[Re; Im]` of the entries along `dim`; it need not be linear over the complex numbers. A `MomentTerm` of a complex
    source maps both parts alike.
    """
