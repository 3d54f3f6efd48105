"""One file per family of SSM layers, found through one registry."""

from hf_compressm.adapters.base import (
    Adapter,
    AttributeChange,
    CutMethod,
    LayerCut,
    Measurement,
    MomentTerm,
    ParameterChange,
    SSMLayer,
    Statistics,
)
from hf_compressm.adapters.calibration import collect_statistics
from hf_compressm.adapters.lru import LRU
from hf_compressm.adapters.mamba import MAMBA
from hf_compressm.adapters.registry import find_layers, register, registered_families
from hf_compressm.adapters.s5 import S5

__all__ = [
    "Adapter",
    "AttributeChange",
    "CutMethod",
    "LayerCut",
    "Measurement",
    "MomentTerm",
    "ParameterChange",
    "SSMLayer",
    "Statistics",
    "collect_statistics",
    "find_layers",
    "register",
    "registered_families",
]

for _adapter in (LRU, MAMBA, S5):
    register(_adapter)
