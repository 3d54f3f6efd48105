"""What a Trainer adds to the cuts of a run: its events, checkpoints, metric, log and publishing."""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerControl
from transformers.utils import logging

from hf_compressm.checkpoints import Sealing, check_resizable
from hf_compressm.compression.history import CALLBACK, CutEvent, read_history
from hf_compressm.config import CompreSSMConfig
from hf_compressm.files.atomic import write_json
from hf_compressm.files.names import HISTORY_FILE, TRAINER_STATE_FILE
from hf_compressm.loops import Calibration, Decisions
from hf_compressm.loops.warmup import Rewarmup
from hf_compressm.peft import is_wrapped, underlying
from hf_compressm.peft.saved_base import check_base, keeps_base_beside, save_base
from hf_compressm.training.clock import StepClock
from hf_compressm.training.copies import refuse_copies
from hf_compressm.training.held_out import held_out_loss
from hf_compressm.training.loading import CheckpointLoader
from hf_compressm.training.recent import TrainerBatches
from hf_compressm.training.recovery import RecoveryGuard, metric_name
from hf_compressm.training.refusals import check_guards, refuse_engines, refuse_optimizer
from hf_compressm.training.remembering import remembered, resume
from hf_compressm.training.reporting import Publisher
from hf_compressm.training.saving import CheckpointSaver
from hf_compressm.training.telling import tell_cut
from hf_compressm.training.trainer import output_folder, run_folder, wrap_methods
from hf_compressm.utils.processes import ALONE, Processes


logger = logging.get_logger(__name__)

LAST_LINE = "train_runtime"
"""What only the last line of a Trainer's log has; a user may log a `train_loss`, perhaps in one process alone."""


class CompressedRun:
    """The cuts of one training run, inside the Trainer that makes it.

    Args:
        config: settings.
        loader: calibration batches of the user's own, or None for those of the run.

    Attributes:
        decisions: the cuts that were tried, and when others come.
        clock: the pace between two lines of the log.
    """

    def __init__(self, config: CompreSSMConfig, loader: Iterable[Any] | None = None) -> None:
        self.config = config
        self._loader_of_batches = loader
        self.decisions = Decisions(config)
        self.clock = StepClock()
        self._trainer: weakref.ref[Trainer] | None = None
        self._loader: CheckpointLoader | None = None
        self._publisher: Publisher | None = None
        self._processes = ALONE
        self._batches: TrainerBatches | None = None
        self._calibration: Calibration | None = None
        self._sealing = Sealing()
        self._begun = False  # whether steps were done in this call of `train`
        self._recovery = RecoveryGuard(config)
        self._model_step: int | None = None  # the step of the model, where the Trainer has loaded its best one

    @property
    def trainer(self) -> Trainer:
        """The Trainer of the run."""
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise ValueError("CompreSSMCallback works inside a Trainer; pass it as Trainer(..., callbacks=[...]).")
        return trainer

    @property
    def is_attached(self) -> bool:
        """Whether the run is that of a Trainer already."""
        return self._trainer is not None

    @property
    def events(self) -> list[CutEvent]:
        """Attempts to cut, oldest first, including those from before a resume and those that were undone."""
        return self.decisions.events

    @property
    def rewarmup(self) -> Rewarmup:
        """The learning rate after a cut."""
        return self.decisions.rewarmup

    @property
    def calibration(self) -> Calibration:
        """What the run is measured on."""
        assert self._calibration is not None  # `attach` comes first
        return self._calibration

    def attach(self, trainer: Trainer | None) -> None:
        """Wrap the methods by which a Trainer loads, saves, logs and publishes; does nothing a second time."""
        if trainer is None or (self._trainer is not None and self._trainer() is trainer):
            return
        self._trainer = weakref.ref(trainer)
        self._loader = CheckpointLoader(trainer, self.config.allow_optimizer_reset, self._best_loaded)
        self._batches = TrainerBatches(trainer)
        self._calibration = Calibration(self._batches, self._loader_of_batches)
        CheckpointSaver(trainer, self._measure, self._begin_checkpoint, self._batches.save, self._finish_checkpoint)
        self._publisher = Publisher(trainer, self.events_and_step, self.write_traces)
        wrap_methods(trainer, {"log": self._log})

    def configure(self, config: CompreSSMConfig) -> None:
        """Take the settings of the run that is about to begin."""
        self.config = config
        self.decisions.configure(config)

    def begin(self, model: Any, optimizer: Any) -> None:
        """Before the first step, refuse a run that cannot work, and resume from a checkpoint."""
        trainer, state = self.trainer, self.trainer.state
        self._processes, self._begun = Processes.current(), False
        refuse_engines(trainer)
        check_base(model)
        refuse_optimizer(optimizer, model)
        if trainer.args.load_best_model_at_end or self.config.recovery_steps is not None:
            check_resizable(underlying(model))
        judges = self.config.max_loss_increase is not None and trainer.eval_dataset is None
        self.calibration.begin(model, self.config, judges, self._processes)
        trigger = self.decisions.begin(model, self.calibration, state.max_steps, self._processes)
        self._restore()
        self.decisions.go_on(model, state.global_step)
        self.clock = StepClock()
        check_guards(trainer, self.config, trigger, state.max_steps)
        logger.info(f"CompreSSM cuts {trigger.describe()}, in a run of {state.max_steps} steps.")

    def cut_follows(self, step: int) -> bool:
        """Whether a cut comes after this step and was not tried yet; a checkpoint of this step may hold it already."""
        return self.decisions.cut_follows(step)

    def epoch_begins(self, model: Any) -> None:
        """Refuse what would keep using the old parameters; by now all callbacks have started."""
        refuse_copies(self.trainer, model, self._begun)

    def step_begins(self, model: Any, optimizer: Any) -> None:
        """Cut if a cut is due, or roll back a cut from which the metric did not recover."""
        step = self.trainer.state.global_step
        if self.cut_follows(step):
            refuse_copies(self.trainer, model, self._begun)
        self._begun = True
        if self._recovery.lacks_metric(step, self.cut_follows(step)):  # the checkpoint was saved before the evaluation
            self.trainer.evaluate()
        if self._recovery.pending is not None and self._recovery.pending.worse:
            self._roll_back(step, model)
        elif self.cut_follows(step):
            self._cut_or_wait(model, optimizer)
        self.calibration.step_begins(step, self.decisions.next_look(step))
        self.clock.step_begins()

    def step_ends(self, model: Any, control: TrainerControl) -> None:
        """Measure the ranking, and request the evaluations and checkpoints that guards and settings need."""
        self.clock.step_ends()
        step = self.trainer.state.global_step
        self.calibration.step_ends(model, self._processes)
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
        """Remove kept checkpoints that no rollback needs any more, once another one is sealed."""
        self.clock.interrupt()
        folder = run_folder(self.trainer)
        if self.trainer.args.should_save and self._recovery.left_over(folder) and self._sealing.has_sealed():
            self._recovery.clean(folder)

    def complete_push(self, model: Any) -> None:
        """Complete the directory that is about to be pushed, since the Trainer pushes only files that it knows."""
        if self.trainer.args.should_save and self.trainer.args.output_dir and self._publisher is not None:
            self._finish_push()
            if keeps_base_beside(model):
                save_base(model, self.trainer.args.output_dir)
            self._publisher.publish(output_folder(self.trainer))

    def end(self, model: Any) -> None:
        """Warn if nothing was cut, and write the history of the run."""
        self._wait_for_seal()
        trainer, state = self.trainer, self.trainer.state
        self.decisions.tell_outcome(model, state.global_step)
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
        """Add the pace to the lines that hold a training loss, before history and trackers get them.

        After its last line a Trainer loads its best checkpoint and removes others, so all are sealed before.
        """
        if LAST_LINE in logs:
            self._wait_for_seal()
        if "loss" in logs:
            logs.update(self.clock.take())
        method(logs, *args, **kwargs)

    def _begin_checkpoint(self, folder: Path) -> None:
        """Write the history before the Trainer writes, so that a checkpoint with its last file has the history too.

        Raises:
            OSError: from the file system, also from sealing the checkpoint before this one.
        """
        self._sealing.wait()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / HISTORY_FILE, self._record())

    def _finish_checkpoint(self, folder: Path) -> None:
        """Write the base beside adapters, and begin to seal the checkpoint."""
        if is_wrapped(model := self.trainer.model):
            save_base(model, folder)
        self._sealing.start(folder)

    def _wait_for_seal(self) -> None:
        """Wait until the last checkpoint is sealed; an error of that is one in all processes."""
        with self._processes.together():
            self._sealing.wait()

    def _finish_push(self) -> None:
        """Wait for a push in progress: it reads the directory that is about to be overwritten.

        Otherwise it could find the configuration of one size and weights of another; or a file could be gone when its
        turn comes, and then nothing is pushed, without any message.
        """
        self.trainer._finish_current_push()

    def _measure(self) -> None:
        """Measure the ranking of this step, once."""
        if self._recovery.pending is None and (logged := self.decisions.observe(self.trainer.state.global_step)):
            self.clock.interrupt()
            self.trainer.log(logged)

    def _cut_or_wait(self, model: Any, optimizer: Any) -> None:
        """Cut; without any batch, after a resume from a checkpoint that kept none, first take a step."""
        step = self.trainer.state.global_step
        if not self.decisions.must_wait(step, self.calibration, self._processes):
            self._cut(model, optimizer)

    def _cut(self, model: Any, optimizer: Any) -> None:
        """Cut under the guard, and begin a recovery if the metric is to decide later."""
        trainer, step, pace = self.trainer, self.trainer.state.global_step, self.clock.take()
        self.clock.restart()
        loss = None
        if self.config.max_loss_increase is not None:
            seed = self.config.sampling_seed + step
            loss = held_out_loss(trainer, model, self.calibration.recent, seed, self._processes)
        kept = self._processes.first(lambda: self._recovery.keep(run_folder(trainer), step))
        request = self.calibration.request(
            self._processes, optimizer=optimizer, step=step, reduction_share=self.decisions.reduction_share
        )
        events = self.decisions.cut(model, request, loss, trainer.model_wrapped)
        self._recovery.begin(events[-1], kept, trainer.state.max_steps)
        for event in events:
            tell_cut(trainer, event, pace)

    def _roll_back(self, step: int, model: Any) -> None:
        """Return to the checkpoint from before the cut, and halve the reduction of the next cut."""
        start, pace, pending, loader = time.perf_counter(), self.clock.take(), self._recovery.pending, self._loader
        self.clock.restart()
        assert pending is not None and loader is not None  # noqa: PT018 - the caller has looked
        with self._processes.together():
            loader.roll_back(run_folder(self.trainer) / pending.folder)
        metrics, seconds = (pending.before, pending.after), time.perf_counter() - start
        event = self.decisions.roll_back(model, step, pending.step, metrics, seconds)
        self._recovery.end()
        if self._processes.is_first:
            logger.warning(
                f"The cut after step {pending.step} is rolled back: {metric_name(self.trainer.args)} went from "
                f"{pending.before:.4g} to {pending.after:.4g} in {pending.due - pending.step} steps. The next cut "
                f"takes {self.decisions.reduction_share:g} of what the settings ask for."
            )
        tell_cut(self.trainer, event, pace)

    def _record(self) -> dict[str, Any]:
        """The history of the run and all that is needed to resume it, JSON-ready."""
        return remembered(self.decisions, self._recovery, self.trainer.model, self._model_step)

    def _restore(self) -> None:
        """Start afresh, or resume from the history of the checkpoint that the Trainer has loaded."""
        trainer = self.trainer
        self._model_step = None
        state: Any = trainer.state
        self.decisions.forget()
        self._recovery = RecoveryGuard(self.config)
        if state.global_step:
            loaded = self._loader.directory if self._loader is not None else None
            folder = loaded or run_folder(trainer) / f"checkpoint-{state.global_step}"
            record = read_history(folder, {"stateful_callbacks": state.stateful_callbacks})
            if record:  # empty where the run began without the callback
                self.restore(record)
            if self._batches is not None:
                self._batches.load(folder)
        state.stateful_callbacks[CALLBACK] = self.exported()

    def events_and_step(self) -> tuple[list[CutEvent], int | None]:
        """The attempts of the run, and the step of its best model if that is the present one."""
        return self.events, self._model_step

    def _best_loaded(self, folder: Path) -> None:
        """Note the step of the best model, and warn if cuts of the run are not part of it."""
        number = folder.name.rpartition("-")[2]
        if not number.isdigit():
            return
        self._model_step = step = int(number)
        lost = [event.step for event in self.events if event.outcome == "cut" and event.step >= step]
        if lost and self._processes.is_first:
            logger.warning(
                f"The best model is that of step {step}, from before the cut after step "
                f"{', '.join(map(str, lost))}: it has the states that were cut there. Train longer after the cut, or "
                "compare only evaluations after it (load_best_model_at_end=False keeps the last model)."
            )

    def restore(self, record: Mapping[str, Any]) -> None:
        """Resume from a history.

        Raises:
            ValueError: if it does not have the form that checkpoints keep.
        """
        resume(record, self.decisions, self._recovery, run_folder(self.trainer))
