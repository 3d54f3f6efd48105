"""The name of a model's cache, which transformers 5.24 made `cache` where each family had its own before."""

import inspect
from collections.abc import Container
from typing import Any

from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput


NAMES = ("cache", "cache_params", "past_key_values")  # newest first: newer outputs answer to the older names too


def cache_of(outputs: ModelOutput) -> Cache:
    """The cache that a model or `generate()` returned."""
    return outputs[_name(outputs)]


def as_cache(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache as a keyword argument of a stock model's forward."""
    return {_name(inspect.signature(model.forward).parameters): cache}


def _name(names: Container[Any]) -> str:
    return next(name for name in NAMES if name in names)
