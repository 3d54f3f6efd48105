"""Compress the state of state-space models while they train, inside Hugging Face `transformers`."""

from typing import TYPE_CHECKING

from hf_compressm.utils.lazy import announce_models, lazy_names


if TYPE_CHECKING:
    from hf_compressm.callback import CompreSSMCallback
    from hf_compressm.checkpoints import find_last_complete_checkpoint, fit_to_weights, verify_checkpoint
    from hf_compressm.compression import (
        CompressionPlan,
        CompressionResult,
        LayerPlan,
        analyze,
        apply_plan,
        compress,
        plan_compression,
    )
    from hf_compressm.config import CompreSSMConfig
    from hf_compressm.families import Layout, declare_layer, rows, states
    from hf_compressm.loops import Compressor
    from hf_compressm.models import (
        CompreSSMamba2Config,
        CompreSSMamba2ForCausalLM,
        CompreSSMamba2Model,
        CompreSSMambaConfig,
        CompreSSMambaForCausalLM,
        CompreSSMambaModel,
        LRUConfig,
        LRUForCausalLM,
        LRUForSequenceClassification,
        LRUModel,
        S5Config,
        S5ForCausalLM,
        S5ForSequenceClassification,
        S5Model,
    )
    from hf_compressm.reports import compress_checkpoint
    from hf_compressm.scans import enable_fast_selective_scan


__version__ = "0.1.0"

__all__ = [
    "CompreSSMCallback",
    "CompreSSMConfig",
    "CompreSSMamba2Config",
    "CompreSSMamba2ForCausalLM",
    "CompreSSMamba2Model",
    "CompreSSMambaConfig",
    "CompreSSMambaForCausalLM",
    "CompreSSMambaModel",
    "CompressionPlan",
    "CompressionResult",
    "Compressor",
    "LRUConfig",
    "LRUForCausalLM",
    "LRUForSequenceClassification",
    "LRUModel",
    "LayerPlan",
    "Layout",
    "S5Config",
    "S5ForCausalLM",
    "S5ForSequenceClassification",
    "S5Model",
    "analyze",
    "apply_plan",
    "compress",
    "compress_checkpoint",
    "declare_layer",
    "enable_fast_selective_scan",
    "find_last_complete_checkpoint",
    "fit_to_weights",
    "plan_compression",
    "rows",
    "states",
    "verify_checkpoint",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "callback": ["CompreSSMCallback"],
        "checkpoints": ["find_last_complete_checkpoint", "fit_to_weights", "verify_checkpoint"],
        "compression": [
            "CompressionPlan",
            "CompressionResult",
            "LayerPlan",
            "analyze",
            "apply_plan",
            "compress",
            "plan_compression",
        ],
        "config": ["CompreSSMConfig"],
        "families": ["Layout", "declare_layer", "rows", "states"],
        "loops": ["Compressor"],
        "models": [name for name in __all__ if "Mamba" in name or name.startswith(("LRU", "S5"))],
        "reports": ["compress_checkpoint"],
        "scans": ["enable_fast_selective_scan"],
    },
)
announce_models(("s5", "lru", "compressm_mamba", "compressm_mamba2"), "hf_compressm.models")
