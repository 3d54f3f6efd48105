"""Checkpoints inside a Trainer: whoever asks for one, it counts only when all of it is there.

A Trainer writes over a checkpoint of the same step file by file, when a run goes on from an earlier one or is told to
end just after a save; and its just-in-time checkpoint tells no callback; and it pushes a checkpoint before the
callback has put in what is its own. So the method by which a Trainer saves is stood in front of.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_compressm.checkpoints import unseal_checkpoint
from hf_compressm.processes import Processes


LEAST_FREE_BYTES = 1 << 16
"""A disk with less is full: what did not fit was a file's next block."""


class CheckpointSaver:
    """Stands in front of a Trainer's method that saves, once for each Trainer.

    Args:
        trainer: whose method is stood in front of.
        prepare: called before anything is written.
        finish: called with the checkpoint's directory when the Trainer has written all its files.
    """

    def __init__(self, trainer: Trainer, prepare: Callable[[], None], finish: Callable[[Path], None]) -> None:
        """Take the Trainer's method."""
        self.trainer = trainer
        self.prepare = prepare
        self.finish = finish
        self._save: Callable[[Any, Any], None] = trainer._save_checkpoint
        vars(trainer).update(_save_checkpoint=self.save_checkpoint)

    def save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that is complete from its seal on, and not before.

        Raises:
            OSError: from the file system; the checkpoint has then no seal.
        """
        self.prepare()
        folder = Path(self.trainer._get_output_dir(trial=trial)) / f"checkpoint-{self.trainer.state.global_step}"
        writes, processes = self.trainer.args.should_save, Processes.current()
        with processes.together():
            if writes:
                unseal_checkpoint(folder)
        with processes.together():  # each process writes a file of its own, and all of them have to be there
            try:
                with _pushes_held(self.trainer) as pushes:
                    self._save(model, trial)
            except Exception as error:
                _raise_if_full(folder, error)
                raise
        with processes.together():
            if writes and folder.is_dir():
                self.finish(folder)
        for pushed in pushes:
            self.trainer._push_from_checkpoint(pushed)


@contextmanager
def _pushes_held(trainer: Trainer) -> Iterator[list[str]]:
    """Collect the checkpoints that a Trainer would push at once: an upload is to find them with all their files."""
    held: list[str] = []
    own = vars(trainer).get("_push_from_checkpoint")
    vars(trainer).update(_push_from_checkpoint=held.append)
    try:
        yield held
    finally:
        if own is None:
            del vars(trainer)["_push_from_checkpoint"]
        else:
            vars(trainer).update(_push_from_checkpoint=own)


def _raise_if_full(folder: Path, error: Exception) -> None:
    """Say what is the matter where the disk is full: `torch.save` speaks of an unexpected position in a stream."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if shutil.disk_usage(place).free < LEAST_FREE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}; the checkpoint is not complete, and the one before it is as it was",
            str(folder),
        ) from error


def watch_saving(trainer: Trainer, prepare: Callable[[], None], finish: Callable[[Path], None]) -> CheckpointSaver:
    """The saver that stands in front of a Trainer's method, put there by the first call."""
    saver = getattr(trainer._save_checkpoint, "__self__", None)
    if not isinstance(saver, CheckpointSaver):
        return CheckpointSaver(trainer, prepare, finish)
    saver.prepare, saver.finish = prepare, finish
    return saver
