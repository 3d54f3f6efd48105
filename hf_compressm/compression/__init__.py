"""Plan a cut, then apply it: no Trainer, no schedule."""

from hf_compressm.compression.applying import analyze, apply_plan, compress
from hf_compressm.compression.comparing import Alternative, compare_tolerances, count_state_bytes
from hf_compressm.compression.plan import CompressionPlan, CompressionResult, LayerPlan
from hf_compressm.compression.planning import plan_compression
from hf_compressm.compression.ranking import Scores, rank_stability, state_scores
from hf_compressm.compression.record import check_record, record_cut, recorded_cuts
from hf_compressm.compression.settings import check_settings


__all__ = [
    "Alternative",
    "CompressionPlan",
    "CompressionResult",
    "LayerPlan",
    "Scores",
    "analyze",
    "apply_plan",
    "check_record",
    "check_settings",
    "compare_tolerances",
    "compress",
    "count_state_bytes",
    "plan_compression",
    "rank_stability",
    "record_cut",
    "recorded_cuts",
    "state_scores",
]
