"""Refusing LoRA where Mamba layers read weights past the module, as peft refuses it for stock models.

Kernels and the causal convolution are given `conv1d.weight` and `out_proj.weight`: a LoRA layer in the place of these
modules would be trained without ever being called. peft knows that of stock models by their `model_type`.
"""

import sys
from typing import Any

from torch import nn


READ_BY_WEIGHT = frozenset({"conv1d", "out_proj"})


class ReadsWeights(nn.Module):
    """Base of mixers that refuse a LoRA layer in place of a module of which only the weights are read."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in READ_BY_WEIGHT and _is_lora(value):
            raise ValueError(
                f"LoRA on '{name}' of a {type(self).__name__} would have no effect: kernels read the weights of "
                f"{' and '.join(sorted(READ_BY_WEIGHT))} past the LoRA layer. Remove it from `target_modules`."
            )
        super().__setattr__(name, value)


def _is_lora(module: Any) -> bool:
    """Whether a module is one of the layers that peft does not put there in stock models, if peft is in use at all."""
    tuners = sys.modules.get("peft.tuners")
    kinds = (getattr(tuners, "lora", None), "LoraLayer"), (getattr(tuners, "randlora", None), "RandLoraLayer")
    classes = tuple(getattr(module_of, name) for module_of, name in kinds if hasattr(module_of, name))
    return isinstance(module, classes)


__all__ = ["ReadsWeights"]
