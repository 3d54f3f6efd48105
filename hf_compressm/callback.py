"""The Trainer callback: when to cut, whether to keep the cut, and telling the Trainer about it. It holds no maths."""

import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_compressm.adapters import is_wrapped
from hf_compressm.bases import check_base, keeps_base_beside, save_base
from hf_compressm.batches import sample_batches
from hf_compressm.checkpoints import HISTORY_FILE, TRAINER_STATE_FILE, seal_checkpoint
from hf_compressm.compression import Scores, check_settings, recorded_cuts, state_scores
from hf_compressm.compression.record import is_number
from hf_compressm.config import CompreSSMConfig
from hf_compressm.durable import quoted, write_json
from hf_compressm.guard import guarded_cut, held_out_batches, held_out_loss
from hf_compressm.history import CutEvent, from_record, rollback_event, to_record
from hf_compressm.pace import StepClock, machine, watch_losses
from hf_compressm.processes import ALONE, Processes
from hf_compressm.publishing import Publisher, watch_publishing
from hf_compressm.recovery import RecoveryGuard, metric_name
from hf_compressm.refusals import check_guards, refuse_copies, refuse_engines, refuse_optimizer
from hf_compressm.resuming import watch_loading
from hf_compressm.saving import watch_saving
from hf_compressm.scalars import scalars
from hf_compressm.scans import enable_fast_selective_scan
from hf_compressm.schedule import Trigger, trigger_for
from hf_compressm.surgery import rebuild_reducers


logger = logging.get_logger(__name__)


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Cuts a model's SSM layers while `Trainer` trains it.

    A cut at step k happens at the start of step k + 1, so that log, evaluation and checkpoint of step k are those of
    the model before it. Sizes and a record of every cut are in `model.config`; `events` has the cuts of this run,
    those from before a resume and those that were undone among them.

    Under `accelerate launch` or `torchrun` with DDP all processes cut together: calibration batches are divided among
    them, the first decides, and all compare new weights and moments before any of them changes.

    Pass it to `Trainer(..., callbacks=[...])`: given later, it cannot see to a checkpoint of another state size that
    the run resumes from.

    Args:
        config: settings, as an object, a mapping, or the path of a YAML or JSON file.

    Raises:
        ValueError: at the start of training, if a setting does not fit the model, no cut could ever happen, a guard
            could not do its work, or the run is one that cannot be cut in place.
    """

    def __init__(self, config: CompreSSMConfig | Mapping[str, Any] | str | Path | None = None) -> None:
        if isinstance(config, str | Path):
            config = CompreSSMConfig.from_file(config)
        elif isinstance(config, Mapping):
            config = CompreSSMConfig.from_dict(config)
        self.config = config or CompreSSMConfig()
        self.events: list[CutEvent] = []
        self._trainer: weakref.ref[Trainer] | None = None
        self._processes = ALONE
        self._trigger: Trigger | None = None
        self._needs_data = True
        self._reduction_share = 1.0  # halved by every rollback
        self._recovery = RecoveryGuard(self.config)
        self._last_cut: int | None = None
        self._measured: int | None = None  # the step after which the ranking was measured last
        self._learning_rates: list[Any] | None = None
        self._clock = StepClock()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: settings and history. Sizes are in the model's config."""
        return {"args": {"config": self.config.to_dict()}, "attributes": {}, "run": self._run()}

    def cut_follows(self, step: int) -> bool:
        """Whether a cut comes after this step, and was not tried yet: a checkpoint may come from after it.

        Args:
            step: optimizer steps done.
        """
        tried = any(event.step == step and event.outcome != "rolled back" for event in self.events)
        return self._trigger is not None and self._trigger.is_due(step) and not tried

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the Trainer, to whose log the callback writes, and stand in front of its loading of checkpoints."""
        self._trainer = _calling_trainer()
        if self._trainer is not None and (trainer := self._trainer()) is not None:
            self._watch(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work before the first step, go on from a checkpoint, and switch on the fast scan."""
        self._trainer = _calling_trainer() or self._trainer
        self._processes = Processes.current()
        refuse_engines(args, self._trainer() if self._trainer else None, type(self))
        model, dataloader = kwargs["model"], kwargs.get("train_dataloader")
        check_base(model)
        refuse_optimizer(kwargs.get("optimizer"), model)
        self._needs_data = any(choice.needs_data for choice in check_settings(model, self.config, calibrated=True))

        def measure() -> Scores:
            sample = self._sample(args, state, dataloader, self.config.sampling_seed)
            return state_scores(model, self.config, sample, self._processes)

        self._trigger = trigger_for(self.config, state.max_steps, measure)
        enable_fast_selective_scan()
        self._restore(state)
        cut_on_disk = any(event.step == state.global_step and event.outcome == "cut" for event in self.events)
        self._last_cut = state.global_step if cut_on_disk else _last_cut_before(model, state.global_step)
        self._measured = state.global_step
        trainer = self._present_trainer()
        self._watch(trainer)
        self._clock = StepClock()
        check_guards(trainer, self.config, self._trigger, state.max_steps)
        logger.info(f"CompreSSM cuts {self._trigger.describe()}, of {state.max_steps}.")

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse callbacks that would go on with the old parameters; by now all of them have begun."""
        refuse_copies(self._present_trainer(), kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut, if it is time to; or go back from a cut that was not recovered from."""
        step = state.global_step
        if self._recovery.lacks_metric(step, self.cut_follows(step)):  # the checkpoint came before the evaluation
            self._present_trainer().evaluate()
        if self._recovery.pending is not None and self._recovery.pending.worse:
            self._roll_back(step, kwargs["model"], args)
        elif self.cut_follows(step):
            self._cut(args, state, kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"])
        self._clock.step_begins()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lower the learning rates for this one step of a re-warm-up."""
        share = self._rewarmup_share(state.global_step)
        if share < 1:
            groups = kwargs["optimizer"].param_groups
            self._learning_rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = group["lr"] * share

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the learning rates back before the scheduler sees them."""
        if self._learning_rates is not None:
            for group, rate in zip(kwargs["optimizer"].param_groups, self._learning_rates, strict=True):
                group["lr"] = rate
            self._learning_rates = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the ranking, and ask for the evaluations and checkpoints that guards and settings need."""
        self._clock.step_ends()
        step = state.global_step
        self._measure()
        follows = self.cut_follows(step)
        after_a_cut = any(event.step == step - 1 and event.outcome == "cut" for event in self.events)
        if (follows and self._recovery.is_on) or ((follows or after_a_cut) and self.config.save_around_cuts):
            control.should_save = True
        if self._recovery.wants_metric(step, follows):
            control.should_evaluate = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the metric to the guard that waits for it."""
        self._clock.interrupt()
        if self._recovery.is_on:
            metrics = self._processes.first(lambda: dict(kwargs.get("metrics", {})))
            self._recovery.see(args, state.global_step, metrics, self.cut_follows(state.global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove what was kept for a rollback that can no longer come, now that a checkpoint is sealed."""
        self._clock.interrupt()
        if args.should_save:
            self._recovery.clean(self._run_folder())

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete what is about to be pushed, since the Trainer pushes only files that it knows."""
        if args.should_save and args.output_dir:
            self._finish_push()
            if keeps_base_beside(kwargs["model"]):
                save_base(kwargs["model"], args.output_dir)
            self._publisher().publish(Path(args.output_dir))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so loudly if nothing was cut, and write the history of the run."""
        tried = [event for event in self.events if event.outcome != "rolled back"]
        if not tried and _last_cut_before(kwargs["model"], state.global_step) is None:
            when = self._trigger.describe() if self._trigger else ""
            logger.warning(f"CompreSSM cut nothing: training ended at step {state.global_step}; cuts come {when}.")
        elif tried and not any(event.outcome == "cut" for event in tried):
            layers = tried[-1].result.plan.layers
            reasons = {f"{layer.name}: {layer.reason}" for layer in layers}
            rule = self.config.rank_rule
            more = f" A {'smaller' if rule == 'target_state_size' else 'larger'} {rule} would cut more."
            undone = sum(event.outcome == "undone" for event in tried)
            logger.warning(
                f"CompreSSM tried {len(tried)} cut(s) and none shrank a layer; {undone} were undone by the guard "
                f"({'; '.join(sorted(reasons))}).{more * any(layer.status == 'kept' for layer in layers)}"
            )
        folder = self._run_folder()
        if args.should_save and self.events and folder.is_dir():
            self._finish_push()
            try:
                self._write_traces(folder)
            except OSError as error:  # the trained model must not be lost over it
                logger.warning(f"The history of the cuts could not be written: {error}")
            if state.global_step >= state.max_steps:  # a run that was stopped may go on, from before a verdict
                self._recovery.clean(folder)

    def _watch(self, trainer: Trainer) -> None:
        """Stand in front of the Trainer's methods that load, save, log and publish."""
        watch_loading(trainer, self.config.allow_optimizer_reset)
        watch_saving(trainer, self._measure, self._seal)
        watch_losses(trainer, lambda: self._clock.take())
        self._publisher()

    def _finish_push(self) -> None:
        """Wait for a push that is going on: it reads the directory that is about to be written to.

        It would find the configuration of one size and weights of another; or a file that has gone when its turn
        comes, and then nothing of it is pushed, without a word.
        """
        self._present_trainer()._finish_current_push()

    def _publisher(self) -> Publisher:
        return watch_publishing(self._present_trainer(), lambda: self.events, self._write_traces)

    def _write_traces(self, folder: Path) -> None:
        """Write the history of the cuts, and the Trainer's state with its log, as a checkpoint has them."""
        state: Any = self._present_trainer().state
        state.stateful_callbacks[type(self).__name__] = self.state()
        write_json(folder / HISTORY_FILE, self._run())
        state.save_to_json(str(folder / TRAINER_STATE_FILE))

    def _measure(self) -> None:
        """Measure the ranking of this step, once."""
        step = self._present_trainer().state.global_step
        if self._trigger is not None and self._recovery.pending is None and step != self._measured:
            self._measured = step
            logged = self._trigger.observe(step)
            if logged:
                self._clock.interrupt()
                self._present_trainer().log(logged)

    def _seal(self, folder: Path) -> None:
        """Write the history beside the weights, and the base beside adapters, and seal the checkpoint."""
        if is_wrapped(model := self._present_trainer().model):
            save_base(model, folder)
        write_json(folder / HISTORY_FILE, self._run())
        seal_checkpoint(folder)

    def _cut(self, args: TrainingArguments, state: TrainerState, model: Any, optimizer: Any, dataloader: Any) -> None:
        """Cut under the guard, and begin a recovery where the metric is to be seen later."""
        step, config, trainer, pace = state.global_step, self.config, self._present_trainer(), self._clock.take()
        self._clock.restart()
        sample = self._sample(args, state, dataloader, config.sampling_seed + step)
        loss = None
        if config.max_loss_increase is not None:
            held_out = held_out_batches(trainer, config, config.sampling_seed + step)

            def loss() -> float:
                return held_out_loss(trainer, model, held_out, self._processes)

        kept = self._processes.first(lambda: self._recovery.keep(self._run_folder(), step))
        events = guarded_cut(model, config, sample, optimizer, step, self._reduction_share, loss, self._processes)
        self.events += events
        self._recovery.begin(events[-1], kept, state.max_steps)
        if events[-1].outcome == "cut":  # after one that was undone, every parameter is the object that it was
            rebuild_reducers(trainer.model_wrapped)
            self._last_cut = step
        for event in events:
            self._report(event, pace)

    def _roll_back(self, step: int, model: Any, args: TrainingArguments) -> None:
        """Return to the checkpoint from before the cut, and let the next cut take half."""
        start, pending, trainer = time.perf_counter(), self._recovery.pending, self._present_trainer()
        pace = self._clock.take()
        self._clock.restart()
        assert pending is not None  # the caller has looked
        with self._processes.together():
            loader = watch_loading(trainer, self.config.allow_optimizer_reset)
            loader.roll_back(self._run_folder() / pending.folder)
        cut = next(event for event in self.events if event.step == pending.step and event.outcome == "cut")
        event = rollback_event(step, cut, pending.before, pending.after, time.perf_counter() - start)
        self.events.append(event)
        self._reduction_share = cut.reduction_share / 2
        self._recovery.end()
        self._last_cut = _last_cut_before(model, step)
        if self._processes.is_first:
            logger.warning(
                f"The cut after step {pending.step} is rolled back: {metric_name(args)} went from "
                f"{pending.before:.4g} to {pending.after:.4g} in {pending.due - pending.step} steps. The next cut "
                f"takes {self._reduction_share:g} of what the settings ask for."
            )
        self._report(event, pace)

    def _sample(
        self, args: TrainingArguments, state: TrainerState, dataloader: Any, seed: int
    ) -> list[Mapping[str, Any]] | None:
        """Calibration batches of the run's own data, the same ones when a run is resumed; None if none are needed."""
        if not self._needs_data:
            return None
        size = state.train_batch_size or args.per_device_train_batch_size
        return sample_batches(dataloader, size, self.config.calibration_batches, seed, self._processes)

    def _rewarmup_share(self, step: int) -> float:
        """Share of the learning rate in the step that follows `step` done steps: 1 / (n + 1), ..., n / (n + 1), 1."""
        if self._last_cut is None or self.config.rewarmup_steps == 0:
            return 1.0
        return min((step - self._last_cut + 1) / (self.config.rewarmup_steps + 1), 1.0)

    def _report(self, event: CutEvent, pace: dict[str, float]) -> None:
        """Log an event through the Trainer, and how fast the steps before it were."""
        self._present_trainer().log(scalars(event) | pace)
        before = event.result.state_sizes_before
        sizes = ", ".join(f"{name} {before[name]} -> {size}" for name, size in event.sizes.items())
        logger.info(f"CompreSSM, {event.outcome} after step {event.step}: {sizes} ({event.result.seconds:.2f} s).")

    def _run(self) -> dict[str, Any]:
        """The history of the run and all that is needed to go on with it, JSON-ready."""
        return to_record(self.events) | {
            "reduction_share": self._reduction_share,
            "recovery": self._recovery.state(),
            "trigger": self._trigger.state() if self._trigger else {},
            "machine": machine(),
        }

    def _restore(self, state: TrainerState) -> None:
        """Start afresh, or go on from what a checkpoint kept, whether or not the Trainer restores callbacks."""
        self.events, self._reduction_share, self._recovery = [], 1.0, RecoveryGuard(self.config)
        stateful: Any = state.stateful_callbacks
        saved = stateful.get(type(self).__name__) if state.global_step else None
        run = saved.get("run") if isinstance(saved, Mapping) else None  # None where it began without the callback
        if isinstance(run, Mapping):
            self.events = from_record(run)
            share = run.get("reduction_share", 1.0)
            recovery, trigger = run.get("recovery") or {}, run.get("trigger") or {}
            if not (is_number(share) and 0 < share <= 1 and isinstance(recovery, dict) and isinstance(trigger, dict)):
                raise ValueError(f"The callback's state in the checkpoint cannot be read: {quoted(run)}.")
            self._reduction_share = float(share)
            self._recovery.restore(recovery, self._run_folder())
            if self._trigger is not None:
                self._trigger.restore(trigger)
        stateful[type(self).__name__] = self.state()

    def _run_folder(self) -> Path:
        """Where the Trainer puts this run's checkpoints; a search over hyperparameters has a folder for each trial."""
        trainer = self._present_trainer()
        return Path(trainer._get_output_dir(trial=getattr(trainer, "_trial", None)))

    def _present_trainer(self) -> Trainer:
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise ValueError("CompreSSMCallback works inside a Trainer; pass it as Trainer(..., callbacks=[...]).")
        return trainer


def _last_cut_before(model: Any, step: int) -> int | None:
    """Step of the last recorded cut of a run that has done `step` steps; later ones are those of an earlier run."""
    cuts = recorded_cuts(getattr(model, "config", None))
    return max((cut["step"] for cut in cuts if cut["step"] and cut["step"] < step), default=None)


def _calling_trainer() -> "weakref.ref[Trainer] | None":
    """The Trainer whose event is being handled: callback events do not carry it, so it is found on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return weakref.ref(candidate)
        frame = frame.f_back
    return None
