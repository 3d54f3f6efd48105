"""Blocks that people build models of, as small modules with the names, shapes and calls of the originals.

The originals need CUDA, or are a file that everybody copies. A block here calls its recurrence as the original does,
by the name that the original's module has for it (`selective_scan_fn`, `mamba_chunk_scan_combined`, ...), which is
this package's scan. Fused functions, which hide the recurrence and often the output projection too, are in `fused.py`.
"""

from .fla import FlaMamba, FlaMamba2
from .mamba3 import Mamba3
from .mamba_ssm import Mamba, Mamba2, Mamba2Simple
from .parts import RMSNormGated, at_path
from .vision import SS2D, OffsetVim, Vim


__all__ = [
    "SS2D",
    "FlaMamba",
    "FlaMamba2",
    "Mamba",
    "Mamba2",
    "Mamba2Simple",
    "Mamba3",
    "OffsetVim",
    "RMSNormGated",
    "Vim",
    "at_path",
]
