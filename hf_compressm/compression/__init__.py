"""Plan a cut, then apply it: no Trainer, no schedule."""

from hf_compressm.compression.applying import analyze, apply_cut, apply_plan, compress, cut
from hf_compressm.compression.choices import check_settings
from hf_compressm.compression.comparing import Alternative, compare_tolerances, count_state_bytes
from hf_compressm.compression.measuring import try_calibration
from hf_compressm.compression.plan import CompressionPlan, CompressionResult, LayerPlan
from hf_compressm.compression.planning import plan_compression, plan_cut
from hf_compressm.compression.record import check_record, record_cut, recorded_cuts
from hf_compressm.compression.request import CutRequest
from hf_compressm.compression.serving import STATE_BYTES, StateCost, memory_bytes, state_cost
from hf_compressm.compression.stability import Scores, rank_stability, requested_scores, state_scores


__all__ = [
    "STATE_BYTES",
    "Alternative",
    "CompressionPlan",
    "CompressionResult",
    "CutRequest",
    "LayerPlan",
    "Scores",
    "StateCost",
    "analyze",
    "apply_cut",
    "apply_plan",
    "check_record",
    "check_settings",
    "compare_tolerances",
    "compress",
    "count_state_bytes",
    "cut",
    "memory_bytes",
    "plan_compression",
    "plan_cut",
    "rank_stability",
    "record_cut",
    "recorded_cuts",
    "requested_scores",
    "state_cost",
    "state_scores",
    "try_calibration",
]
