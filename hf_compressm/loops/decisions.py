"""What a training run decides: when to look, when to cut, whether a cut stands, and how the run goes on after it.

Nothing here knows who runs the steps: a Trainer, or a loop of one's own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_compressm.compression import CutRequest, Scores, recorded_cuts, requested_scores
from hf_compressm.compression.history import CutEvent, from_record, rollback_event
from hf_compressm.config import CompreSSMConfig
from hf_compressm.loops.calibration import Calibration
from hf_compressm.loops.guard import guarded_cut
from hf_compressm.loops.outcome import tell_outcome
from hf_compressm.loops.schedule import Trigger, trigger_for
from hf_compressm.loops.warmup import Rewarmup
from hf_compressm.surgery import rebuild_reducers
from hf_compressm.utils.checks import is_number, quoted
from hf_compressm.utils.configurations import configurations
from hf_compressm.utils.processes import Processes


logger = logging.get_logger(__name__)


class Decisions:
    """The cuts of one run: those to come, and those that were tried.

    Args:
        config: settings.

    Attributes:
        events: attempts to cut, oldest first, including those from before a resume and those that were undone.
        rewarmup: the learning rate after a cut.
        trigger: what decides when a cut is due; None before the run begins.
        reduction_share: share of the reduction that the settings ask for; halved by every rollback.
        waits: whether a cut that was due waits for the first batch.
    """

    def __init__(self, config: CompreSSMConfig) -> None:
        self.config = config
        self.rewarmup = Rewarmup(config.rewarmup_steps)
        self.trigger: Trigger | None = None
        self.forget()

    def configure(self, config: CompreSSMConfig) -> None:
        """Take the settings of a run that is about to begin."""
        self.config, self.rewarmup = config, Rewarmup(config.rewarmup_steps)

    def forget(self) -> None:
        """Start without a past."""
        self.events: list[CutEvent] = []
        self.reduction_share = 1.0
        self.waits = False
        self._measured: int | None = None  # the step after which the ranking was measured last

    def begin(self, model: nn.Module, calibration: Calibration, total_steps: int, processes: Processes) -> Trigger:
        """Find out when cuts come, and return the trigger.

        Args:
            model: the model.
            calibration: what it is measured on.
            total_steps: optimizer steps of the run.
            processes: the processes that train it together.

        Raises:
            ValueError: if no cut could happen.
        """

        def measure() -> Scores:
            return requested_scores(model, calibration.ranking_request(processes))

        self.trigger = trigger_for(self.config, total_steps, measure)
        return self.trigger

    def go_on(self, model: nn.Module, step: int) -> None:
        """Continue after a step, with the re-warm-up of the cut before it; a cut of this step may be made already."""
        cut_made = any(event.step == step and event.outcome == "cut" for event in self.events)
        self.rewarmup.last_cut = step if cut_made else self.last_cut_before(model, step)
        self._measured = step

    def cut_follows(self, step: int) -> bool:
        """Whether a cut comes after this step and was not tried yet."""
        tried = any(event.step == step and event.outcome != "rolled back" for event in self.events)
        return self.trigger is not None and (self.trigger.is_due(step) or self.waits) and not tried

    def next_look(self, step: int) -> int | None:
        """The next step after which the model will be measured; None if none is."""
        following = self.trigger.next_look(step) if self.trigger is not None else None
        return step + 1 if self.waits else following

    def observe(self, step: int) -> dict[str, float]:
        """Measure the ranking after a step, once; returns numbers to log."""
        if self.trigger is None or step == self._measured:
            return {}
        self._measured = step
        return self.trigger.observe(step)

    def must_wait(self, step: int, calibration: Calibration, processes: Processes) -> bool:
        """Whether a cut that is due has nothing to measure on, and waits for one more step."""
        self.waits = processes.first(lambda: calibration.lacks_batches)
        if self.waits and processes.is_first:
            logger.warning(
                f"The cut after step {step} waits for one step: the checkpoint that the run resumed from has no "
                "batches to measure on."
            )
        return self.waits

    def cut(
        self, model: nn.Module, request: CutRequest, loss: Callable[[], float] | None, wrapped: nn.Module
    ) -> list[CutEvent]:
        """Cut under the guard; returns one event for each attempt.

        Args:
            model: the model.
            request: request for the first attempt.
            loss: measures the model's held-out loss; None for no guard.
            wrapped: the model as it is trained.
        """
        events = guarded_cut(model, request, loss)
        self.events += events
        if events[-1].outcome == "cut":  # after an undone one, all parameters are the same objects
            rebuild_reducers(wrapped)
            self.rewarmup.last_cut = request.step
        return events

    def roll_back(
        self, model: nn.Module, step: int, cut_step: int, metrics: tuple[float, float | None], seconds: float
    ) -> CutEvent:
        """Note that the model has returned to before a cut, and halve the reduction of the next one.

        Args:
            model: the model.
            step: optimizer steps done.
            cut_step: those done before the cut.
            metrics: the metric before the cut, and at the end of the recovery.
            seconds: what the way back took.
        """
        cut = next(event for event in self.events if event.step == cut_step and event.outcome == "cut")
        event = rollback_event(step, cut, *metrics, seconds)
        self.events.append(event)
        self.reduction_share = cut.reduction_share / 2
        self.rewarmup.last_cut = self.last_cut_before(model, step)
        return event

    def last_cut_before(self, model: nn.Module, step: int) -> int | None:
        """Step of the last cut of a run that has done `step` steps; later ones are those of an earlier run."""
        records = [recorded_cuts(each) for each in (getattr(model, "config", None), *configurations(model))]
        steps = next(([cut["step"] for cut in cuts] for cuts in records if cuts), None)
        if steps is None:  # a model without any configuration keeps no record
            steps = []
            for event in self.events:
                steps = (
                    steps[:-1] if event.outcome == "rolled back" else steps + [event.step] * (event.outcome == "cut")
                )
        return max((cut for cut in steps if cut and cut < step), default=None)

    def tell_outcome(self, model: nn.Module, step: int) -> None:
        """Warn at the end of a run in which nothing was cut."""
        when = self.trigger.describe() if self.trigger else ""
        tell_outcome(self.events, self.config, when, step, self.last_cut_before(model, step))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the events, JSON-ready."""
        return {
            "reduction_share": self.reduction_share,
            "waits": self.waits,
            "trigger": self.trigger.state() if self.trigger else {},
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Resume with the events and the state that a checkpoint kept.

        Raises:
            ValueError: if it does not have the form that checkpoints keep.
        """
        events = from_record(record)
        share, trigger = record.get("reduction_share", 1.0), record.get("trigger") or {}
        if not (is_number(share) and 0 < share <= 1 and isinstance(trigger, dict)):
            raise ValueError(f"The history in the checkpoint cannot be read: {quoted(record)}.")
        if self.trigger is not None:
            self.trigger.restore(trigger)
        self.events, self.reduction_share, self.waits = events, float(share), record.get("waits") is True
