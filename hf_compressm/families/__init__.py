"""One file per family of SSM layers, found through one registry."""

from hf_compressm.families import mamba as _mamba  # noqa: F401 - registers its layers
from hf_compressm.families.changes import AttributeChange, MomentTerm, ParameterAddition, ParameterChange
from hf_compressm.families.complex_terms import ComplexTerm
from hf_compressm.families.declaring import declare_layer
from hf_compressm.families.delta import DeltaFamily
from hf_compressm.families.falcon_mamba import NormalizedMambaFamily
from hf_compressm.families.family import CutMethod, Family, LayerCut, LayerShape, Measurement, SSMLayer
from hf_compressm.families.fla import FlaFamily
from hf_compressm.families.kimi import KimiFamily
from hf_compressm.families.layout import Layout, rows, states
from hf_compressm.families.lightning import LightningFamily
from hf_compressm.families.lru import LRUFamily
from hf_compressm.families.mamba2 import Mamba2Family
from hf_compressm.families.mamba3 import Mamba3Family
from hf_compressm.families.mlstm import MLSTMFamily
from hf_compressm.families.owners import Holder, Owner, holders_of
from hf_compressm.families.registry import (
    family_of,
    find_layers,
    misconfigured,
    register,
    registered_families,
    size_fields,
)
from hf_compressm.families.s5 import S5Family
from hf_compressm.families.s5_pytorch import S5PytorchFamily
from hf_compressm.families.selective import SelectiveFamily
from hf_compressm.families.statistics import collect_statistics, refuse_single_batch, run_batch
from hf_compressm.families.sums import Statistics
from hf_compressm.families.vision import SS2D, VIM


__all__ = [
    "SS2D",
    "VIM",
    "AttributeChange",
    "ComplexTerm",
    "CutMethod",
    "DeltaFamily",
    "Family",
    "FlaFamily",
    "Holder",
    "KimiFamily",
    "LRUFamily",
    "LayerCut",
    "LayerShape",
    "Layout",
    "LightningFamily",
    "MLSTMFamily",
    "Mamba2Family",
    "Mamba3Family",
    "Measurement",
    "MomentTerm",
    "NormalizedMambaFamily",
    "Owner",
    "ParameterAddition",
    "ParameterChange",
    "S5Family",
    "S5PytorchFamily",
    "SSMLayer",
    "SelectiveFamily",
    "Statistics",
    "collect_statistics",
    "declare_layer",
    "family_of",
    "find_layers",
    "holders_of",
    "misconfigured",
    "refuse_single_batch",
    "register",
    "registered_families",
    "rows",
    "run_batch",
    "size_fields",
    "states",
]
