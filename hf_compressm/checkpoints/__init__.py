"""Checkpoints and saved models on disk: reading and sealing them, fitting a live model to them, cutting them."""

from hf_compressm.checkpoints.cutting import cut_checkpoint
from hf_compressm.checkpoints.fitting import (
    check_resizable,
    fit_to_checkpoint,
    fit_with_adapters,
    load_converted,
    records_of,
)
from hf_compressm.checkpoints.in_memory import fit_to_sizes, fit_to_weights, sizes_of
from hf_compressm.checkpoints.reading import find_last_complete_checkpoint, read_saved, verify_checkpoint
from hf_compressm.checkpoints.saved_model import SavedModel
from hf_compressm.checkpoints.seal import seal_checkpoint, unseal_checkpoint
from hf_compressm.checkpoints.sealing import Sealing, wait_for_seal
from hf_compressm.checkpoints.whole import read_whole, refuse_run_folder


__all__ = [
    "SavedModel",
    "Sealing",
    "check_resizable",
    "cut_checkpoint",
    "find_last_complete_checkpoint",
    "fit_to_checkpoint",
    "fit_to_sizes",
    "fit_to_weights",
    "fit_with_adapters",
    "load_converted",
    "read_saved",
    "read_whole",
    "records_of",
    "refuse_run_folder",
    "seal_checkpoint",
    "sizes_of",
    "unseal_checkpoint",
    "verify_checkpoint",
    "wait_for_seal",
]
