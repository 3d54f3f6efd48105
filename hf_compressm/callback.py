"""The Trainer callback: each of its hooks tells the run what the Trainer has come to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_compressm.compression.history import CutEvent
from hf_compressm.config import CompreSSMConfig
from hf_compressm.training import CompressedRun, calling_trainer, refuse_copies


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
        self._run = CompressedRun(self.config)

    @property
    def events(self) -> list[CutEvent]:
        """Attempts to cut, oldest first."""
        return self._run.events

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of the callback: its settings."""
        return self._run.exported()

    def cut_follows(self, step: int) -> bool:
        """Whether a cut comes after this step, and was not tried yet: a checkpoint may come from after it.

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
        """Refuse what cannot work before the first step, and go on from a checkpoint."""
        self._run.attach(calling_trainer())
        self._run.begin(kwargs["model"], kwargs.get("optimizer"), kwargs.get("train_dataloader"))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse callbacks that would go on with the old parameters; by now all of them have begun."""
        refuse_copies(self._run.trainer, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut, if it is time to; or go back from a cut that was not recovered from."""
        self._run.step_begins(kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lower the learning rates for this one step of a re-warm-up."""
        self._run.rewarmup.lower(kwargs["optimizer"], state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the learning rates back before the scheduler sees them."""
        self._run.rewarmup.restore(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure the ranking, and ask for the evaluations and checkpoints that guards and settings need."""
        self._run.step_ends(control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the metric to the guard that waits for it."""
        self._run.evaluated(kwargs.get("metrics", {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove what was kept for a rollback that can no longer come."""
        self._run.saved()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete what is about to be pushed."""
        self._run.complete_push(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if nothing was cut, and write the history of the run."""
        self._run.end(kwargs["model"])
