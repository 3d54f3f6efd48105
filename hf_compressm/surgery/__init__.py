"""The only code that replaces parameters of a model, of its optimizer, and sizes in its config."""

from hf_compressm.surgery.configuration import write_sizes, write_sizes_of_mamba_ssm, write_sizes_per_layer
from hf_compressm.surgery.optimizer import commit_optimizer, prepare_optimizer
from hf_compressm.surgery.parameters import (
    NonFiniteError,
    commit_replacements,
    prepare_additions,
    prepare_replacements,
)


__all__ = [
    "NonFiniteError",
    "commit_optimizer",
    "commit_replacements",
    "prepare_additions",
    "prepare_optimizer",
    "prepare_replacements",
    "write_sizes",
    "write_sizes_of_mamba_ssm",
    "write_sizes_per_layer",
]
