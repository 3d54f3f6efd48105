"""The cuts of a training run, whoever makes its steps: a loop of one's own, or a Trainer."""

from hf_compressm.loops.calibration import Calibration, refuse_loader
from hf_compressm.loops.compressor import Compressor
from hf_compressm.loops.decisions import Decisions


__all__ = ["Calibration", "Compressor", "Decisions", "refuse_loader"]
