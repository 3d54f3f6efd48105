"""The configurations of a model: its own, those of its parts, and those inside them, such as `text_config`."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def configuration_of(module: Any) -> Any:
    """The configuration that a module holds: a transformers one, or any other object with values; else None."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "__dict__") and not isinstance(config, type | nn.Module) else None


def with_inner(config: Any) -> Iterator[Any]:
    """A configuration, and the transformers configurations inside it at any depth."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from with_inner(value)


def configurations(model: Any) -> list[Any]:
    """The distinct configurations of a model, its parts, and those inside them; empty for None."""
    held = (configuration_of(part) for part in (model.modules() if isinstance(model, nn.Module) else ()))
    found = {id(each): each for config in held if config is not None for each in with_inner(config)}
    return list(found.values())
