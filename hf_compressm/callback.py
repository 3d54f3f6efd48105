"""The Trainer callback: each of its hooks passes an event of the Trainer on to the run."""

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_compressm.compression.history import CutEvent
from hf_compressm.config import CompreSSMConfig, Settings, as_config
from hf_compressm.loops import refuse_loader
from hf_compressm.training import CompressedRun, calling_trainer


class CompreSSMCallback(TrainerCallback, ExportableState):
    """A callback that cuts a model's SSM layers while `Trainer` trains it.

    A cut at step k happens at the start of step k + 1, so that log, evaluation and checkpoint of step k are those of
    the model before it. Sizes and a record of every cut are in `model.config`; `events` lists the cuts of this
    run, including those from before a resume and those that were undone.

    Under `accelerate launch` or `torchrun` with DDP all processes cut together: calibration batches are divided among
    them, the first process decides, and all compare new weights and moments before any of them changes.

    Pass it to `Trainer(..., callbacks=[...])`: added later, it cannot prepare the model for a checkpoint of another
    state size that the run resumes from.

    Args:
        config: settings, as an object, a mapping, or the path of a YAML or JSON file.
        calibration: batches of model inputs on which layers are measured, such as a DataLoader; the first
            `calibration_batches` of them are used at each cut. By default the run's own: the batches of the steps just
            before a cut, run through the Trainer's `compute_loss` again.

    Raises:
        ValueError: for a `calibration` that is no list or loader of batches; at the start of training, if a setting
            does not fit the model, no cut could ever happen, a guard could not work, or the run cannot be cut in
            place; after the first step, if its batch cannot be measured on.
    """

    def __init__(self, config: Settings = None, calibration: Iterable[Any] | None = None) -> None:
        self.config = config
        refuse_loader(calibration)
        self._calibration = calibration
        self._last = CompressedRun(self.config, calibration)

    @property
    def _run(self) -> CompressedRun:
        """The run of the Trainer whose event is being handled; each Trainer has one of its own."""
        trainer = calling_trainer()
        if trainer is not None:
            runs: dict[CompreSSMCallback, CompressedRun] = vars(trainer).setdefault("_compressm_runs", {})
            if self not in runs:
                runs[self] = CompressedRun(self.config, self._calibration) if self._last.is_attached else self._last
            self._last = runs[self]
        return self._last

    @property
    def config(self) -> CompreSSMConfig:
        """Settings; new ones, in any form that the callback takes, count from the next training on."""
        return self._config

    @config.setter
    def config(self, config: Settings) -> None:
        self._config = as_config(config)

    @property
    def events(self) -> list[CutEvent]:
        """Attempts to cut, oldest first; with several Trainers, those of the last one that called."""
        return self._run.events

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of the callback: its settings."""
        return self._run.exported()

    def cut_follows(self, step: int) -> bool:
        """Whether a cut comes after this step and was not tried yet; a checkpoint of this step may hold it already.

        Args:
            step: optimizer steps done.
        """
        return self._run.cut_follows(step)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the Trainer, and wrap its methods that load, save, log and publish."""
        self._run.attach(calling_trainer())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, refuse a run that cannot work, and resume from a checkpoint."""
        self._run.attach(calling_trainer())
        self._run.configure(self.config)
        self._run.begin(kwargs["model"], kwargs.get("optimizer"))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what would keep using the old parameters; by now all callbacks have started."""
        self._run.epoch_begins(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut if a cut is due, or roll back a cut from which the metric did not recover."""
        self._run.step_begins(kwargs["model"], kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lower the learning rates for this one step of a re-warm-up."""
        self._run.rewarmup.lower(kwargs["optimizer"], state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the learning rates before the scheduler sees them."""
        self._run.rewarmup.restore(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the ranking, and request the evaluations and checkpoints that guards and settings need."""
        self._run.step_ends(kwargs["model"], control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the metric to the guard that waits for it."""
        self._run.evaluated(kwargs.get("metrics", {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove kept checkpoints that no rollback needs any more."""
        self._run.saved()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the directory that is about to be pushed."""
        self._run.complete_push(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if nothing was cut, and write the history of the run."""
        self._run.end(kwargs["model"])
