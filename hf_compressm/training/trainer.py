"""Finding the Trainer that a callback works in, and wrapping its methods."""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer


_HANDLERS = "_compressm_handlers"

Handler = Callable[..., Any]
"""Called with the Trainer's own method first, then the arguments."""


def wrap_methods(trainer: Trainer, handlers: Mapping[str, Handler]) -> None:
    """Call `handler(method, *args, **kwargs)` wherever one of a Trainer's methods is called.

    A method is wrapped once: a second handler replaces the first.

    Raises:
        ValueError: naming the method, if the Trainer has none of that name; no method is then wrapped.
    """
    absent = [name for name in handlers if not callable(getattr(trainer, name, None))]
    if absent:
        raise ValueError(
            f"This version of transformers has no Trainer.{absent[0]}, which hf_compressm wraps. Use a version that "
            "hf_compressm names in its requirements."
        )
    present: dict[str, Handler] = vars(trainer).setdefault(_HANDLERS, {})
    for name, handler in handlers.items():
        if name not in present:
            vars(trainer)[name] = _wrapped(getattr(trainer, name), name, present)
        present[name] = handler


def calling_trainer() -> Trainer | None:
    """The Trainer whose event is being handled: callback events do not carry it, so it is found on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back
    return None


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run's checkpoints; a search over hyperparameters has one for each trial."""
    return Path(trainer._get_output_dir(trial=getattr(trainer, "_trial", None)))


def output_folder(trainer: Trainer) -> Path:
    """The folder where a Trainer saves its model."""
    return Path(trainer.args.output_dir or ".")


def _wrapped(method: Callable[..., Any], name: str, handlers: Mapping[str, Handler]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return handlers[name](method, *args, **kwargs)

    return call
