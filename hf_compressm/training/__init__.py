"""Cutting inside a Trainer: when cuts happen, under which guards, and how checkpoints work across them."""

from hf_compressm.training.run import CompressedRun
from hf_compressm.training.trainer import calling_trainer


__all__ = ["CompressedRun", "calling_trainer"]
