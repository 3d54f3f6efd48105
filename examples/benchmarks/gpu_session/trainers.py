"""A run of a Trainer without the callback and with it: seconds, and how often the host waited for the device."""

import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_session.scale import Scale
from gpu_session.steps import mamba, tokens
from gpu_session.timing import peak_memory
from gpu_session.ways import reason_against
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMCallback


WITHOUT, WITH = "without the callback", "with the callback"
WAIT = "synchronizing"
"""In PyTorch's warning of an operation that waits for a GPU."""
PLACES = 20
"""That waits are counted by, in the results."""


class Steps(TrainerCallback):
    """Counts, at the end of every step, the warnings so far."""

    def __init__(self, seen: Sequence[warnings.WarningMessage]) -> None:
        self.seen, self.counts = seen, [0]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is done."""
        self.counts.append(len(waits_of(self.seen)))

    @property
    def usual(self) -> float:
        """Waits of the median step."""
        return statistics.median(after - before for before, after in zip(self.counts, self.counts[1:], strict=False))


def waits_of(seen: Sequence[warnings.WarningMessage]) -> list[str]:
    """The lines of code that waited for a GPU."""
    return [
        f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
        for warning in seen
        if WAIT in str(warning.message)
    ]


@contextmanager
def every_wait(device: str) -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings, with one for every operation that waits for a GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def run_times(way: str, size: int, scale: Scale) -> dict[str, Any]:
    """Seconds of `train()`, its waits, the peak of memory, and with the callback the seconds of its one cut.

    The model is a Mamba-1 of the largest size, and is cut to the smallest after a third of the steps.
    """
    torch.manual_seed(0)
    batch = tokens(scale)
    dataset = [{name: tensor[i % scale.batch].cpu() for name, tensor in batch.items()} for i in range(8 * scale.batch)]
    cut = {"target_state_size": scale.ends[1], "end": scale.trainer_steps // 3, "num_cuts": 1}
    callbacks = [CompreSSMCallback(cut)] if way == WITH else []
    with tempfile.TemporaryDirectory() as folder, every_wait(scale.device) as seen:
        arguments = _arguments(folder, scale)
        trainer = Trainer(mamba(size, scale), arguments, train_dataset=dataset, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        _warm_up(trainer.model, batch, scale)
        seen.clear()
        steps = Steps(seen)
        trainer.add_callback(steps)
        start = time.perf_counter()
        trainer.train()
        if scale.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        waits = waits_of(seen)
    outcomes = [event.outcome for callback in callbacks for event in callback.events]
    if way == WITH and outcomes != ["cut"]:
        raise RuntimeError(f"the run should have had one cut, and had {outcomes}")
    found = {"milliseconds": 1000 * seconds, "peak": peak_memory(scale.device)}
    found |= {"waits": len(waits), "waits of a step": steps.usual, "places": Counter(waits).most_common(PLACES)}
    found |= {"scan": "torch" if reason_against("triton", "mamba", scale.device) else "triton"}
    return found | {"cut": sum(event.result.seconds for callback in callbacks for event in callback.events)}


def _arguments(folder: str, scale: Scale) -> TrainingArguments:
    """Of a run that saves and logs nothing."""
    is_gpu = scale.device == "cuda"
    return TrainingArguments(
        folder,
        max_steps=scale.trainer_steps,
        per_device_train_batch_size=scale.batch,
        bf16=is_gpu,
        use_cpu=not is_gpu,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def _warm_up(model: torch.nn.Module, batch: dict[str, torch.Tensor], scale: Scale) -> None:
    """A step without an update, so that nothing is compiled in the run."""
    with torch.autocast(scale.device, torch.bfloat16, enabled=scale.device == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
