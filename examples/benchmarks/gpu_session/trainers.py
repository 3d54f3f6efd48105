"""A run of a Trainer without the callback and with it: seconds, and how often the device was waited for."""

import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_session.scale import Scale
from gpu_session.steps import mamba, tokens
from gpu_session.timing import peak_memory
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback


WITHOUT, WITH = "without the callback", "with the callback"


@contextmanager
def synchronisations(device: str) -> Iterator[list[str]]:
    """Collects, until the end, the warnings of operations that wait for a GPU."""
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits += [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]


def run_times(way: str, size: int, scale: Scale) -> dict[str, Any]:
    """Seconds of `train()`, synchronisations, the peak of memory, and with the callback the seconds of its one cut.

    The model is a Mamba-1 of the largest size, and is cut to the smallest.
    """
    torch.manual_seed(0)
    model = mamba(size, scale)
    batch = tokens(scale)
    dataset = [{name: tensor[i % scale.batch].cpu() for name, tensor in batch.items()} for i in range(8 * scale.batch)]
    cut = {"target_state_size": scale.ends[1], "end": scale.trainer_steps // 3, "num_cuts": 1}
    callbacks = [CompreSSMCallback(cut)] if way == WITH else []
    is_gpu = scale.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
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
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=callbacks)
        _warm_up(trainer.model, batch, scale)
        with synchronisations(scale.device) as waits:
            start = time.perf_counter()
            trainer.train()
            if is_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    found = {"milliseconds": 1000 * seconds, "synchronisations": len(waits), "peak": peak_memory(scale.device)}
    cuts = [event for callback in callbacks for event in callback.events]
    if way == WITH and [event.outcome for event in cuts] != ["cut"]:
        raise RuntimeError(f"the run should have one cut, and has {[event.outcome for event in cuts]}")
    return found | {"cut": sum(event.result.seconds for event in cuts)}


def _warm_up(model: torch.nn.Module, batch: dict[str, torch.Tensor], scale: Scale) -> None:
    """A step without an update, so that nothing is compiled in the run."""
    with torch.autocast(scale.device, torch.bfloat16, enabled=scale.device == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
