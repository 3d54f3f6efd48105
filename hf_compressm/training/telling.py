"""What is told of a cut while a run goes on: every number to the log and the trackers, one sentence to a person."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging

from hf_compressm.compression.history import CutEvent
from hf_compressm.compression.log import scalars, sentence


logger = logging.get_logger(__name__)

_DISPLAYS = ("training_bar", "training_tracker")
"""What callbacks keep that show a run at a terminal or in a notebook: those of transformers, and trl's."""


def tell_cut(trainer: Trainer, event: CutEvent, pace: dict[str, float]) -> None:
    """Log an attempt to cut through the Trainer, and tell it in a sentence where the Trainer prints its log.

    `log_history` and all callbacks that report to trackers get every number, a handful for each layer. Callbacks that
    print the log would make one line of them, so they are passed over. The sentence goes to standard output, as their
    lines do, between progress bars; or to the logger where nothing prints.

    Args:
        trainer: the Trainer of the run.
        event: the attempt.
        pace: of the steps before it.
    """
    printers = [callback for callback in trainer.callback_handler.callbacks if _prints(callback)]
    with _silent(printers):
        trainer.log(scalars(event) | pace)
    if not printers:
        logger.info(sentence(event))
    elif trainer.state.is_world_process_zero:
        tqdm.write(sentence(event))


def _prints(callback: TrainerCallback) -> bool:
    """Whether a callback shows the log to a person."""
    return isinstance(callback, PrinterCallback) or any(hasattr(callback, name) for name in _DISPLAYS)


@contextmanager
def _silent(printers: list[TrainerCallback]) -> Iterator[None]:
    """Keep callbacks from seeing what is logged."""
    own = [vars(printer).get("on_log") for printer in printers]
    for printer in printers:
        vars(printer)["on_log"] = _nothing
    try:
        yield
    finally:
        for printer, method in zip(printers, own, strict=True):
            vars(printer).pop("on_log", None)  # one that was added twice has none by now
            if method is not None:
                vars(printer)["on_log"] = method


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take an event and do nothing."""
