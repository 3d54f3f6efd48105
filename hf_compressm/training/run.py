"""What happens in a run: when to cut, whether to keep a cut, how to roll it back, and what a checkpoint keeps."""

import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerControl
from transformers.utils import logging

from hf_compressm.checkpoints import check_resizable, records_of, seal_checkpoint
from hf_compressm.compression import CutRequest, Scores, check_settings, recorded_cuts, state_scores
from hf_compressm.compression.history import CALLBACK, CutEvent, from_record, read_history, rollback_event, to_record
from hf_compressm.compression.log import scalars
from hf_compressm.config import CompreSSMConfig
from hf_compressm.files.atomic import write_json
from hf_compressm.files.names import HISTORY_FILE, TRAINER_STATE_FILE
from hf_compressm.peft import is_wrapped, underlying
from hf_compressm.peft.saved_base import check_base, keeps_base_beside, save_base
from hf_compressm.scans import enable_fast_selective_scan
from hf_compressm.surgery import rebuild_reducers
from hf_compressm.training.calibration import sample_batches
from hf_compressm.training.clock import StepClock, machine
from hf_compressm.training.guard import guarded_cut, held_out_batches, held_out_loss
from hf_compressm.training.loading import CheckpointLoader
from hf_compressm.training.recovery import RecoveryGuard, metric_name
from hf_compressm.training.refusals import check_guards, refuse_engines, refuse_optimizer
from hf_compressm.training.reporting import Publisher, tell_outcome
from hf_compressm.training.saving import CheckpointSaver
from hf_compressm.training.schedule import Trigger, trigger_for
from hf_compressm.training.trainer import output_folder, run_folder, wrap_methods
from hf_compressm.training.warmup import Rewarmup
from hf_compressm.utils.checks import is_number, quoted
from hf_compressm.utils.configurations import configurations
from hf_compressm.utils.processes import ALONE, Processes


logger = logging.get_logger(__name__)


class CompressedRun:
    """The cuts of one training run, inside the Trainer that makes it.

    Args:
        config: settings.

    Attributes:
        events: attempts to cut, oldest first, including those from before a resume and those that were undone.
        rewarmup: the learning rate after a cut.
        clock: the pace between two lines of the log.
    """

    def __init__(self, config: CompreSSMConfig) -> None:
        self.config = config
        self.events: list[CutEvent] = []
        self.rewarmup = Rewarmup(config.rewarmup_steps)
        self.clock = StepClock()
        self._trainer: weakref.ref[Trainer] | None = None
        self._loader: CheckpointLoader | None = None
        self._publisher: Publisher | None = None
        self._processes = ALONE
        self._needs_data = True
        self._trigger: Trigger | None = None
        self._recovery = RecoveryGuard(config)
        self._reduction_share = 1.0  # halved by every rollback
        self._measured: int | None = None  # the step after which the ranking was measured last

    @property
    def trainer(self) -> Trainer:
        """The Trainer of the run."""
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise ValueError("CompreSSMCallback works inside a Trainer; pass it as Trainer(..., callbacks=[...]).")
        return trainer

    def attach(self, trainer: Trainer | None) -> None:
        """Wrap the methods by which a Trainer loads, saves, logs and publishes; does nothing a second time."""
        if trainer is None or (self._trainer is not None and self._trainer() is trainer):
            return
        self._trainer = weakref.ref(trainer)
        self._loader = CheckpointLoader(trainer, self.config.allow_optimizer_reset)
        CheckpointSaver(trainer, self._measure, self._begin_checkpoint, self._finish_checkpoint)
        self._publisher = Publisher(trainer, lambda: self.events, self.write_traces)
        wrap_methods(trainer, {"log": self._log})

    def begin(self, model: Any, optimizer: Any, dataloader: Any) -> None:
        """Before the first step, refuse a run that cannot work, resume from a checkpoint, and enable the fast scan."""
        trainer, state = self.trainer, self.trainer.state
        self._processes = Processes.current()
        refuse_engines(trainer)
        check_base(model)
        refuse_optimizer(optimizer, model)
        if trainer.args.load_best_model_at_end or self.config.recovery_steps is not None:
            check_resizable(underlying(model))
        self._needs_data = any(choice.needs_data for choice in check_settings(model, self.config, calibrated=True))

        def measure() -> Scores:
            sample = self._sample(dataloader, self.config.sampling_seed)
            return state_scores(model, self.config, sample, self._processes)

        self._trigger = trigger_for(self.config, state.max_steps, measure)
        enable_fast_selective_scan()
        self._restore()
        cut_on_disk = any(event.step == state.global_step and event.outcome == "cut" for event in self.events)
        self.rewarmup.last_cut = state.global_step if cut_on_disk else self._last_cut_before(model, state.global_step)
        self._measured = state.global_step
        self.clock = StepClock()
        check_guards(trainer, self.config, self._trigger, state.max_steps)
        logger.info(f"CompreSSM cuts {self._trigger.describe()}, in a run of {state.max_steps} steps.")

    def cut_follows(self, step: int) -> bool:
        """Whether a cut comes after this step and was not tried yet; a checkpoint of this step may hold it already."""
        tried = any(event.step == step and event.outcome != "rolled back" for event in self.events)
        return self._trigger is not None and self._trigger.is_due(step) and not tried

    def step_begins(self, model: Any, optimizer: Any, dataloader: Any) -> None:
        """Cut if a cut is due, or roll back a cut from which the metric did not recover."""
        step = self.trainer.state.global_step
        if self._recovery.lacks_metric(step, self.cut_follows(step)):  # the checkpoint was saved before the evaluation
            self.trainer.evaluate()
        if self._recovery.pending is not None and self._recovery.pending.worse:
            self._roll_back(step, model)
        elif self.cut_follows(step):
            self._cut(model, optimizer, dataloader)
        self.clock.step_begins()

    def step_ends(self, control: TrainerControl) -> None:
        """Measure the ranking, and request the evaluations and checkpoints that guards and settings need."""
        self.clock.step_ends()
        step = self.trainer.state.global_step
        self._measure()
        follows = self.cut_follows(step)
        after_a_cut = any(event.step == step - 1 and event.outcome == "cut" for event in self.events)
        if (follows and self._recovery.is_on) or ((follows or after_a_cut) and self.config.save_around_cuts):
            control.should_save = True
        if self._recovery.wants_metric(step, follows):
            control.should_evaluate = True

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Pass the metric to the guard that waits for it."""
        self.clock.interrupt()
        if self._recovery.is_on:
            seen, step = self._processes.first(lambda: dict(metrics)), self.trainer.state.global_step
            self._recovery.see(self.trainer.args, step, seen, self.cut_follows(step))

    def saved(self) -> None:
        """Remove kept checkpoints that no rollback needs any more, now that another one is sealed."""
        self.clock.interrupt()
        if self.trainer.args.should_save:
            self._recovery.clean(run_folder(self.trainer))

    def complete_push(self, model: Any) -> None:
        """Complete the directory that is about to be pushed, since the Trainer pushes only files that it knows."""
        if self.trainer.args.should_save and self.trainer.args.output_dir and self._publisher is not None:
            self._finish_push()
            if keeps_base_beside(model):
                save_base(model, self.trainer.args.output_dir)
            self._publisher.publish(output_folder(self.trainer))

    def end(self, model: Any) -> None:
        """Warn if nothing was cut, and write the history of the run."""
        trainer, state = self.trainer, self.trainer.state
        when = self._trigger.describe() if self._trigger else ""
        tell_outcome(
            self.events, self.config, when, state.global_step, self._last_cut_before(model, state.global_step)
        )
        folder = run_folder(trainer)
        if trainer.args.should_save and self.events and folder.is_dir():
            self._finish_push()
            try:
                self.write_traces(folder)
            except OSError as error:  # the trained model must not be lost because of it
                logger.warning(f"The history of the cuts could not be written: {error}")
            if state.global_step >= state.max_steps:  # a stopped run may resume from before a verdict
                self._recovery.clean(folder)

    def write_traces(self, folder: Path) -> None:
        """Write the history of the cuts, and the Trainer's state with its log, as a checkpoint has them."""
        state: Any = self.trainer.state
        state.stateful_callbacks[CALLBACK] = self.exported()
        write_json(folder / HISTORY_FILE, self._record())
        state.save_to_json(str(folder / TRAINER_STATE_FILE))

    def exported(self) -> dict[str, Any]:
        """What the Trainer keeps of its callback: the settings. The history has a file of its own."""
        return {"args": {"config": self.config.to_dict()}, "attributes": {}}

    def _log(self, method: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the pace to the lines that hold a training loss, before history and trackers get them."""
        if "loss" in logs:
            logs.update(self.clock.take())
        method(logs, *args, **kwargs)

    def _begin_checkpoint(self, folder: Path) -> None:
        """Write the history before the Trainer writes, so that a checkpoint with its last file has the history too."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / HISTORY_FILE, self._record())

    def _finish_checkpoint(self, folder: Path) -> None:
        """Write the base beside adapters, and seal the checkpoint."""
        if is_wrapped(model := self.trainer.model):
            save_base(model, folder)
        seal_checkpoint(folder)

    def _finish_push(self) -> None:
        """Wait for a push in progress: it reads the directory that is about to be overwritten.

        Otherwise it could find the configuration of one size and weights of another; or a file could be gone when its
        turn comes, and then nothing is pushed, without any message.
        """
        self.trainer._finish_current_push()

    def _measure(self) -> None:
        """Measure the ranking of this step, once."""
        step = self.trainer.state.global_step
        if self._trigger is not None and self._recovery.pending is None and step != self._measured:
            self._measured = step
            if logged := self._trigger.observe(step):
                self.clock.interrupt()
                self.trainer.log(logged)

    def _cut(self, model: Any, optimizer: Any, dataloader: Any) -> None:
        """Cut under the guard, and begin a recovery if the metric is to decide later."""
        trainer, step, pace = self.trainer, self.trainer.state.global_step, self.clock.take()
        self.clock.restart()
        seed = self.config.sampling_seed + step
        sample = self._sample(dataloader, seed)
        loss = None
        if self.config.max_loss_increase is not None:
            held_out = held_out_batches(trainer, self.config, seed)

            def loss() -> float:
                return held_out_loss(trainer, model, held_out, self._processes)

        kept = self._processes.first(lambda: self._recovery.keep(run_folder(trainer), step))
        request = CutRequest(self.config, sample, optimizer, step, self._reduction_share, self._processes)
        events = guarded_cut(model, request, loss)
        self.events += events
        self._recovery.begin(events[-1], kept, trainer.state.max_steps)
        if events[-1].outcome == "cut":  # after an undone one, all parameters are the same objects
            rebuild_reducers(trainer.model_wrapped)
            self.rewarmup.last_cut = step
        for event in events:
            self._report(event, pace)

    def _roll_back(self, step: int, model: Any) -> None:
        """Return to the checkpoint from before the cut, and halve the reduction of the next cut."""
        start, pace, pending, loader = time.perf_counter(), self.clock.take(), self._recovery.pending, self._loader
        self.clock.restart()
        assert pending is not None and loader is not None  # noqa: PT018 - the caller has looked
        with self._processes.together():
            loader.roll_back(run_folder(self.trainer) / pending.folder)
        cut = next(event for event in self.events if event.step == pending.step and event.outcome == "cut")
        event = rollback_event(step, cut, pending.before, pending.after, time.perf_counter() - start)
        self.events.append(event)
        self._reduction_share = cut.reduction_share / 2
        self._recovery.end()
        self.rewarmup.last_cut = self._last_cut_before(model, step)
        if self._processes.is_first:
            logger.warning(
                f"The cut after step {pending.step} is rolled back: {metric_name(self.trainer.args)} went from "
                f"{pending.before:.4g} to {pending.after:.4g} in {pending.due - pending.step} steps. The next cut "
                f"takes {self._reduction_share:g} of what the settings ask for."
            )
        self._report(event, pace)

    def _sample(self, dataloader: Any, seed: int) -> list[Mapping[str, Any]] | None:
        """Calibration batches of the run's own data, the same in a resumed run; None if none are needed."""
        if not self._needs_data:
            return None
        size = self.trainer.state.train_batch_size or self.trainer.args.per_device_train_batch_size
        return sample_batches(dataloader, size, self.config.calibration_batches, seed, self._processes)

    def _report(self, event: CutEvent, pace: dict[str, float]) -> None:
        """Log an event, and the pace of the steps before it, through the Trainer."""
        self.trainer.log(scalars(event) | pace)
        before = event.result.state_sizes_before
        sizes = ", ".join(f"{name} {before[name]} -> {size}" for name, size in event.sizes.items())
        logger.info(f"CompreSSM, {event.outcome} after step {event.step}: {sizes} ({event.result.seconds:.2f} s).")

    def _record(self) -> dict[str, Any]:
        """The history of the run and all that is needed to resume it, JSON-ready."""
        records = records_of(underlying(self.trainer.model))
        return (
            to_record(self.events)
            | ({"records": records} if records else {})
            | {
                "reduction_share": self._reduction_share,
                "recovery": self._recovery.state(),
                "trigger": self._trigger.state() if self._trigger else {},
                "machine": machine(),
            }
        )

    def _restore(self) -> None:
        """Start afresh, or resume from the history of the checkpoint that the Trainer has loaded."""
        trainer = self.trainer
        state: Any = trainer.state
        self.events, self._reduction_share, self._recovery = [], 1.0, RecoveryGuard(self.config)
        if state.global_step:
            loaded = self._loader.directory if self._loader is not None else None
            folder = loaded or run_folder(trainer) / f"checkpoint-{state.global_step}"
            record = read_history(folder, {"stateful_callbacks": state.stateful_callbacks})
            if record:  # empty where the run began without the callback
                self.restore(record)
        state.stateful_callbacks[CALLBACK] = self.exported()

    def restore(self, record: Mapping[str, Any]) -> None:
        """Resume from a history.

        Raises:
            ValueError: if it does not have the form that checkpoints keep.
        """
        self.events = from_record(record)
        share = record.get("reduction_share", 1.0)
        recovery, trigger = record.get("recovery") or {}, record.get("trigger") or {}
        if not (is_number(share) and 0 < share <= 1 and isinstance(recovery, dict) and isinstance(trigger, dict)):
            raise ValueError(f"The history in the checkpoint cannot be read: {quoted(record)}.")
        self._reduction_share = float(share)
        self._recovery.restore(recovery, run_folder(self.trainer))
        if self._trigger is not None:
            self._trigger.restore(trigger)

    def _last_cut_before(self, model: Any, step: int) -> int | None:
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
