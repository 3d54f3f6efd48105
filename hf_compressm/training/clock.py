"""How fast a run is: steps per second between two lines of the Trainer's log, without cuts, evaluations and saves."""

import time

import torch
import transformers

from hf_compressm.compression.log import PACE


def machine() -> str:
    """What a pace was measured with: versions, and the accelerator or the threads of the CPU."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU with {torch.get_num_threads()} thread(s)"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {device}"


class StepClock:
    """A clock that counts steps and their seconds, with the loading of data between them, until they are taken.

    The first step of a run and the first after a cut are not counted: they pay for new buffers or for compilation.

    A Trainer on an accelerator waits for it in every step, when it checks whether the loss is finite
    (`logging_nan_inf_filter`). If that is off, a pace is only as exact as the queue of work is short.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._skips = True

    def step_begins(self) -> None:
        """Start the clock, unless it still runs from the previous step."""
        if self._since is None:
            self._since = time.perf_counter()

    def step_ends(self) -> None:
        """Count the step; the clock keeps running."""
        if self._since is not None:
            now = time.perf_counter()
            if not self._skips:
                self._seconds += now - self._since
                self._steps += 1
            self._since, self._skips = now, False

    def interrupt(self) -> None:
        """Stop until the next step begins."""
        self._since = None

    def restart(self) -> None:
        """Stop, and do not count the next step."""
        self._since, self._skips = None, True

    def take(self) -> dict[str, float]:
        """Steps per second since the last call, as an entry of a log; empty if no step was counted."""
        steps, seconds = self._steps, self._seconds
        self._steps, self._seconds = 0, 0.0
        return {PACE: steps / seconds} if steps and seconds > 0 else {}
