"""What a run is measured on: the batches of its own last steps, or those of a loader that its user gave."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_compressm.compression import CutRequest, check_settings, try_calibration
from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import refuse_single_batch
from hf_compressm.families.sampling import sampled
from hf_compressm.loops.packing import warn_of_packed_texts
from hf_compressm.loops.recent import Batch, RecentBatches
from hf_compressm.scans import enable_fast_selective_scan
from hf_compressm.utils.processes import Processes
from hf_compressm.utils.randomness import undisturbed


class Calibration:
    """The calibration of one run.

    Args:
        recent: the batches of the run's last steps.
        loader: batches of model inputs to use instead, or None.
    """

    def __init__(self, recent: RecentBatches, loader: Iterable[Any] | None) -> None:
        """Measure nothing yet."""
        self.recent = recent
        self._config = CompreSSMConfig()
        self._loader = loader
        self._measures = self._judges = self._untried = self._near = False

    def begin(self, model: nn.Module, config: CompreSSMConfig, judges: bool, processes: Processes) -> None:
        """Start a run afresh, with the fast scan; a loader of the user's own is tried at once, on its first batch.

        Args:
            model: the model.
            config: settings.
            judges: whether the loss of recent batches decides if a cut is kept.
            processes: the processes that train the model together.

        Raises:
            ValueError: if the settings do not fit the model, or if that batch cannot be used.
        """
        enable_fast_selective_scan()
        self._config, self._judges = config, judges
        choices = check_settings(model, config, calibrated=True)
        self._measures = any(choice.needs_data for choice in choices)
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
        self.recent.want(self._needs_steps and (self._near or self._untried))
        if not self._near:
            self.recent.clear()

    def step_ends(self, model: nn.Module, processes: Processes) -> None:
        """After the first step, make sure that its batch can be measured on.

        Raises:
            ValueError: if the step left no batch, or its batch cannot be run a second time.
        """
        if not self._untried:
            return
        self._untried = False
        batches = list(self.recent)[-1:]
        if not self._near:
            self.recent.clear()
        if not batches:
            raise ValueError(self.recent.absence)
        try:
            if self._judges:
                with undisturbed(model), torch.no_grad():
                    self.recent.loss(model, batches[0])
            if self._measures and self._loader is None:
                request = CutRequest(self._config, batches, processes=processes, forward=self._forward)
                inputs = batches[0].inputs if hasattr(batches[0].inputs, "items") else batches[0].others
                warn_of_packed_texts(try_calibration(model, request), inputs)
        except torch.OutOfMemoryError:  # a Trainer may try again with smaller batches
            raise
        except Exception as error:
            raise ValueError(f"{error} ({self.recent.origin})") from error

    def _forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run a batch again, for its loss where that is measured, and measure on a sample of it."""
        run = self.recent.loss if self._config.criterion == "fisher" else self.recent.run
        with sampled():
            return run(model, batch)

    @property
    def _needs_steps(self) -> bool:
        """Whether batches of the run's own steps are used."""
        return self._judges or (self._measures and self._loader is None)


def refuse_loader(calibration: Any) -> None:
    """Refuse what cannot be iterated over anew at each cut.

    Raises:
        ValueError: for a single batch, or an iterator.
    """
    refuse_single_batch(calibration)
    if isinstance(calibration, Iterator):
        raise ValueError(
            f"calibration is a {type(calibration).__name__}, which is used up by the first cut. Pass a list or a "
            "DataLoader."
        )
