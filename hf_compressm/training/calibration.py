"""What a run is measured on: the batches of its own last steps, or those of a loader that its user gave."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.compression import CutRequest, check_settings, try_calibration
from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import SSMLayer, Statistics
from hf_compressm.families.sampling import sampled
from hf_compressm.training.recent import Batch, RecentBatches
from hf_compressm.utils.processes import Processes
from hf_compressm.utils.randomness import undisturbed


logger = logging.get_logger(__name__)


class Calibration:
    """The calibration of one run.

    Args:
        trainer: the Trainer that makes it.
        loader: batches of model inputs to use instead of those of the run, or None.

    Attributes:
        recent: the batches of the run's last steps.
    """

    def __init__(self, trainer: Trainer, loader: Iterable[Any] | None) -> None:
        """Watch the Trainer's steps."""
        self.recent = RecentBatches(trainer)
        self._trainer = trainer
        self._config = CompreSSMConfig()
        self._loader = loader
        self._measures = self._judges = self._untried = self._near = False

    def begin(self, model: nn.Module, config: CompreSSMConfig, processes: Processes) -> None:
        """Start a run afresh; a loader of the user's own is tried at once, on its first batch.

        Raises:
            ValueError: if the settings do not fit the model, or if that batch cannot be used.
        """
        self._config = config
        choices = check_settings(model, config, calibrated=True)
        self._measures = any(choice.needs_data for choice in choices)
        self._judges = self._config.max_loss_increase is not None and self._trainer.eval_dataset is None
        self._untried = self._needs_steps
        self.recent.begin(math.ceil(self._config.calibration_batches / processes.size))
        if self._measures and self._loader is not None:
            first = list(itertools.islice(self._loader, 1))
            try_calibration(model, CutRequest(self._config, first, processes=processes))

    @property
    def lacks_batches(self) -> bool:
        """Whether a cut needs batches of the run's steps, and there is none yet."""
        return self._needs_steps and not len(self.recent)

    def request(self, processes: Processes, **others: Any) -> CutRequest:
        """A request for a cut, or a measurement, on what there is now."""
        if not self._measures:
            return CutRequest(self._config, processes=processes, **others)
        if self._loader is not None:
            batches = itertools.islice(self._loader, self._config.calibration_batches)
            own = itertools.islice(batches, processes.rank, None, processes.size)
            return CutRequest(self._config, own, processes=processes, **others)
        return CutRequest(self._config, list(self.recent), processes=processes, forward=self._forward, **others)

    def ranking_request(self, processes: Processes) -> CutRequest:
        """A request to measure the ranking, always on the batches of the first time: only the model may differ."""
        if not self.recent.reference and self._measures and self._loader is None:
            self.recent.reference = list(self.recent)
        request = self.request(processes)
        return replace(request, calibration=self.recent.reference) if self.recent.reference else request

    def step_begins(self, step: int, following: int | None) -> None:
        """Keep the batches of the step that begins if a measurement is near, and forget old ones otherwise.

        Args:
            step: optimizer steps done.
            following: the step after which the next measurement comes, if any does.
        """
        if following is None:
            self._untried = False
        self._near = following is not None and following - step <= self.recent.count
        self.recent.wanted = self._needs_steps and (self._near or self._untried)
        if not self._near:
            self.recent.clear()

    def step_ends(self, model: nn.Module, processes: Processes) -> None:
        """After the first step, make sure that its batch can be measured on.

        Raises:
            ValueError: if the step called no `compute_loss`, or its batch cannot be run a second time.
        """
        if not self._untried:
            return
        self._untried = False
        batches = list(self.recent)[-1:]
        if not self._near:
            self.recent.clear()
        if not batches:
            raise ValueError(
                f"{type(self._trainer).__name__} made a step without calling its compute_loss, where the batches for "
                "calibration are taken. Pass batches of model inputs: CompreSSMCallback(config, calibration=loader)."
            )
        try:
            if self._judges:
                with undisturbed(model), torch.no_grad():
                    self.recent.loss(model, batches[0])
            if self._measures and self._loader is None:
                request = CutRequest(self._config, batches, processes=processes, forward=self._forward)
                warn_of_packed_texts(try_calibration(model, request), batches[0].inputs)
        except torch.OutOfMemoryError:  # the Trainer may try again with smaller batches
            raise
        except Exception as error:
            raise ValueError(
                f"{error} (It is the batch of the first step, run again by {type(self._trainer).__name__}."
                "compute_loss in evaluation mode and without gradients. If that cannot work, pass batches of "
                "model inputs, CompreSSMCallback(config, calibration=loader), and an eval_dataset for a guard.)"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the batches of this process that a run needs if it resumes from this checkpoint."""
        self.recent.save(folder)

    def load(self, folder: Path) -> None:
        """Start with the batches of a checkpoint, if it has any.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        self.recent.load(folder)

    def _forward(self, model: nn.Module, batch: Batch) -> None:
        """Run a batch again, and measure on a sample of it."""
        with sampled():
            self.recent.run(model, batch)

    @property
    def _needs_steps(self) -> bool:
        """Whether batches of the run's own steps are used."""
        return self._judges or (self._measures and self._loader is None)


def warn_of_packed_texts(seen: Sequence[tuple[SSMLayer, Statistics | None]], inputs: Any) -> None:
    """Warn if a batch has several texts in one row, and states run from one into the next.

    Args:
        seen: the layers, each with what the batch shows of it.
        inputs: the batch.
    """
    found = dict(_packings(inputs))
    told = [layer for layer, item in seen if item is None or item.told_apart]
    apart = [layer for layer in told if layer.family.tells_texts_apart_by & found.keys()]
    blind = sorted({layer.family.name for layer, _ in seen if layer not in apart})
    if not found or not blind:
        return
    logger.warning(
        f"The batches are packed, several texts in one row ({next(iter(found.values()))}), and the state of "
        f"{', '.join(blind)} layers runs from one text into the next, in training and therefore in "
        "calibration. Pad instead of packing, or give Mamba-2 layers `seq_idx` "
        "(DataCollatorWithFlattening(return_seq_idx=True))."
    )


def _packings(inputs: Any) -> Iterator[tuple[str, str]]:
    """The entries of a batch that tell of several texts in a row, with how they show it."""
    entries = inputs if hasattr(inputs, "items") else {}
    mask = entries.get("attention_mask")
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            continue
        if name == "position_ids" and value.dim() == 2 and _restarts(value, mask):
            yield name, "position_ids restart"
        elif name == "seq_idx" and bool((value != value[..., :1]).any()):
            yield name, "seq_idx changes"
        elif name.startswith("cu_seq") and value.numel() > 2:
            yield name, f"{name} has {value.numel() - 1} parts"


def _restarts(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether positions go back to 0 after a token that is no padding."""
    back = (positions[:, 1:] == 0) & (positions[:, :-1] > 0)
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        back = back & (mask[:, :-1] > 0)
    return bool(torch.any(back))
