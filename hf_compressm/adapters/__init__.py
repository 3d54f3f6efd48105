"""One file per family of SSM layers, found through one registry."""

from hf_compressm.adapters.base import (
    Adapter,
    AttributeChange,
    CutMethod,
    LayerCut,
    Measurement,
    MomentTerm,
    ParameterAddition,
    ParameterChange,
    SSMLayer,
    Statistics,
)
from hf_compressm.adapters.calibration import collect_statistics, undisturbed
from hf_compressm.adapters.falcon_mamba import NormalizedMambaAdapter
from hf_compressm.adapters.lora import check_adapters, follow, is_wrapped, plain_modules, resized, underlying
from hf_compressm.adapters.lru import LRUAdapter
from hf_compressm.adapters.mamba import MambaAdapter
from hf_compressm.adapters.mamba2 import Mamba2Adapter
from hf_compressm.adapters.registry import find_layers, register, registered_families, size_fields
from hf_compressm.adapters.s5 import S5Adapter
from hf_compressm.adapters.zamba import ZambaAdapter


__all__ = [
    "Adapter",
    "AttributeChange",
    "CutMethod",
    "LRUAdapter",
    "LayerCut",
    "Mamba2Adapter",
    "MambaAdapter",
    "Measurement",
    "MomentTerm",
    "NormalizedMambaAdapter",
    "ParameterAddition",
    "ParameterChange",
    "S5Adapter",
    "SSMLayer",
    "Statistics",
    "ZambaAdapter",
    "check_adapters",
    "collect_statistics",
    "find_layers",
    "follow",
    "is_wrapped",
    "plain_modules",
    "register",
    "registered_families",
    "resized",
    "size_fields",
    "underlying",
    "undisturbed",
]
