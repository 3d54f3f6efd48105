"""Saving checkpoints inside a Trainer, so that each of them is valid only once all its files are written.

A Trainer overwrites a checkpoint of the same step file by file, when a run resumes from an earlier one or is told to
end just after a save. Its just-in-time checkpoint calls no callback, and it pushes a checkpoint before the callback
has added its own files. So the methods by which a Trainer saves and pushes checkpoints are wrapped.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_compressm.checkpoints import unseal_checkpoint, wait_for_seal
from hf_compressm.training.trainer import wrap_methods
from hf_compressm.utils.processes import Processes


LEAST_FREE_BYTES = 1 << 16
"""A disk with less is full: the next block of a file did not fit."""


class CheckpointSaver:
    """A wrapper of the methods by which a Trainer saves and pushes checkpoints.

    Args:
        trainer: the Trainer whose methods are wrapped.
        prepare: called first, in every process.
        begin: called in the process that writes, with the checkpoint's directory, before the Trainer writes to it.
        add: called in every process, with the directory, likewise before the Trainer writes: a checkpoint that a crash
            leaves whole, but without a seal, must have these files.
        finish: called in the process that writes, when all files are written; it may go on in the background.
    """

    def __init__(
        self,
        trainer: Trainer,
        prepare: Callable[[], None],
        begin: Callable[[Path], None],
        add: Callable[[Path], None],
        finish: Callable[[Path], None],
    ) -> None:
        self._trainer = trainer
        self._prepare = prepare
        self._begin = begin
        self._add = add
        self._finish = finish
        self._held: list[str] | None = None
        wrap_methods(trainer, {"_save_checkpoint": self._save, "_push_from_checkpoint": self._push})

    def _save(self, method: Callable[[Any, Any], None], model: Any, trial: Any) -> None:
        """Write a checkpoint that is complete only once it is sealed.

        Raises:
            OSError: from the file system; the checkpoint, or the one before it, then has no seal.
        """
        self._prepare()
        trainer, processes = self._trainer, Processes.current()
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        with processes.together():
            if trainer.args.should_save:
                wait_for_seal(folder)
                unseal_checkpoint(folder)
                self._begin(folder)
        self._held = []
        try:
            with processes.together():  # each process writes a file of its own, and all are needed
                try:
                    self._add(folder)
                    method(model, trial)
                except Exception as error:
                    _raise_if_full(folder, error)
                    raise
            with processes.together():
                if trainer.args.should_save and folder.is_dir():
                    self._finish(folder)
        finally:
            held, self._held = self._held, None
        for pushed in held:
            trainer._push_from_checkpoint(pushed)

    def _push(self, method: Callable[[str], None], folder: str) -> None:
        """Push a checkpoint once it has all its files, and its seal."""
        if self._held is None:
            wait_for_seal(Path(folder))
            method(folder)
        else:
            self._held.append(folder)


def _raise_if_full(folder: Path, error: Exception) -> None:
    """Raise a clear error if the disk is full: `torch.save` reports an unexpected position in a stream."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if shutil.disk_usage(place).free < LEAST_FREE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}; the checkpoint is not complete, and the one before it is unchanged",
            str(folder),
        ) from error
