"""Sealing checkpoints while training goes on.

To seal a checkpoint, every byte of it is flushed to the disk and read again: minutes for a large model, while all
processes would wait for the one that writes. So a thread does it. Whoever reads or overwrites a checkpoint in this
process waits for its seal first. A process that ends waits for it too, since the thread is not a daemon; one that is
killed leaves a checkpoint without a seal, which counts if all its files can be read.
"""

from pathlib import Path
from threading import Thread, current_thread

from transformers.utils import logging

from hf_compressm.checkpoints.seal import files_to_seal, seal_checkpoint


logger = logging.get_logger(__name__)

_UNDER_WAY: dict[Path, Thread] = {}
"""The threads that seal, by the directory of the checkpoint."""


class Sealing:
    """Seals the checkpoints of a run, one after the other, in the background."""

    def __init__(self) -> None:
        """Start with nothing to do."""
        self._directory: Path | None = None
        self._error: Exception | None = None

    def start(self, directory: Path) -> None:
        """Begin to seal the files that a checkpoint has now, once the one before it is sealed.

        What other callbacks write into it from now on is not part of the seal, and may be only half written.

        Raises:
            Exception: of the checkpoint before it.
        """
        self.wait()
        self._directory = directory.resolve()
        files = files_to_seal(self._directory)
        thread = Thread(target=self._seal, args=(self._directory, files), name=f"seal {directory.name}")
        _UNDER_WAY[self._directory] = thread
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            _UNDER_WAY.pop(self._directory, None)
            self._seal(self._directory, files)

    def wait(self) -> None:
        """Wait until the last checkpoint is sealed.

        Raises:
            OSError: from the file system, once; the checkpoint has no seal.
        """
        if not self.has_sealed():
            error, self._error = self._error, None
            assert error is not None  # what `has_sealed` says
            raise error

    def has_sealed(self) -> bool:
        """Wait as `wait` does, and say whether it went well; `wait` still raises afterwards."""
        if self._directory is not None:
            wait_for_seal(self._directory)
        return self._error is None

    def _seal(self, directory: Path, files: list[Path]) -> None:
        try:
            seal_checkpoint(directory, files)
        except FileNotFoundError as error:  # somebody has removed a file, or all of them, and training goes on
            logger.warning(f"{directory} has no seal: {error}")
        except Exception as error:
            logger.error(f"{directory} has no seal: {error}")
            self._error = error
        finally:
            _UNDER_WAY.pop(directory, None)


def wait_for_seal(directory: Path) -> None:
    """Wait while a checkpoint is being sealed in this process; its error is not raised here."""
    thread = _UNDER_WAY.get(directory.resolve())
    if thread is not None and thread is not current_thread():
        thread.join()
