"""The only code that replaces parameters of a model and of its optimizer, and sizes in its config."""

from hf_compressm.surgery.caches import refuse_stale_caches
from hf_compressm.surgery.configuration import has_room, is_described, rewritten, tell_undescribed
from hf_compressm.surgery.ddp import find_wrappers, rebuild_reducers, unsupported_feature
from hf_compressm.surgery.lora import check_adapters, follow, resized
from hf_compressm.surgery.operation import Operation
from hf_compressm.surgery.optimizer import commit_optimizer, misfit, prepare_optimizer, reset, unwrap
from hf_compressm.surgery.parameters import (
    Addition,
    NonFiniteError,
    Replacement,
    commit_replacements,
    prepare_additions,
    prepare_replacements,
)
from hf_compressm.surgery.reshaping import follows_config, reshape_layers, reshape_model, skeleton
from hf_compressm.surgery.snapshot import Snapshot
from hf_compressm.surgery.stores import check_optimizer, held_parameter


__all__ = [
    "Addition",
    "NonFiniteError",
    "Operation",
    "Replacement",
    "Snapshot",
    "check_adapters",
    "check_optimizer",
    "commit_optimizer",
    "commit_replacements",
    "find_wrappers",
    "follow",
    "follows_config",
    "has_room",
    "held_parameter",
    "is_described",
    "misfit",
    "prepare_additions",
    "prepare_optimizer",
    "prepare_replacements",
    "rebuild_reducers",
    "refuse_stale_caches",
    "reset",
    "reshape_layers",
    "reshape_model",
    "resized",
    "rewritten",
    "skeleton",
    "tell_undescribed",
    "unsupported_feature",
    "unwrap",
]
