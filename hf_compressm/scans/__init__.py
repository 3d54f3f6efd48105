"""Scans of diagonal, selective and matrix-valued states: naive references, and fast versions with own backward."""

from .delta import delta_scan, delta_scan_reference, delta_states
from .diagonal import diagonal_scan, diagonal_scan_reference, diagonal_states
from .selective import selective_scan, selective_scan_reference, selective_states
from .ssd import ssd_scan, ssd_scan_reference, ssd_states
from .stock import disable_fast_selective_scan, enable_fast_selective_scan


__all__ = [
    "delta_scan",
    "delta_scan_reference",
    "delta_states",
    "diagonal_scan",
    "diagonal_scan_reference",
    "diagonal_states",
    "disable_fast_selective_scan",
    "enable_fast_selective_scan",
    "selective_scan",
    "selective_scan_reference",
    "selective_states",
    "ssd_scan",
    "ssd_scan_reference",
    "ssd_states",
]
