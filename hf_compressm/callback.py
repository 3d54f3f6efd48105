"""The Trainer callback: when to cut, and telling the Trainer about it. It holds no mathematics."""

import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_compressm.batches import sample_batches
from hf_compressm.compression import check_settings, compress, recorded_cuts
from hf_compressm.config import CompreSSMConfig
from hf_compressm.history import CutEvent, scalars
from hf_compressm.scans import enable_fast_selective_scan
from hf_compressm.schedule import cut_steps


logger = logging.get_logger(__name__)


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Cuts a model's SSM layers while `Trainer` trains it.

    A cut at step k happens at the start of step k + 1, so that log, evaluation and checkpoint of step k are those of
    the model before it. Sizes and a record of every cut are in `model.config`; `events` has the cuts of this run.

    Args:
        config: settings, as an object, a mapping, or the path of a YAML or JSON file.

    Raises:
        ValueError: at the start of training, if a setting does not fit the model, no cut could ever happen, or the
            run is one that cannot be cut in place.
    """

    def __init__(self, config: CompreSSMConfig | Mapping[str, Any] | str | Path | None = None) -> None:
        if isinstance(config, str | Path):
            config = CompreSSMConfig.from_file(config)
        elif isinstance(config, Mapping):
            config = CompreSSMConfig.from_dict(config)
        self.config = config or CompreSSMConfig()
        self.events: list[CutEvent] = []
        self._steps: tuple[int, ...] = ()
        self._needs_data = True
        self._last_cut: int | None = None
        self._learning_rates: list[Any] | None = None
        self._trainer: weakref.ref[Trainer] | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: its settings. The truth about sizes is in the model's config."""
        return {"args": {"config": self.config.to_dict()}, "attributes": {}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the Trainer, whose log the callback writes to."""
        self._trainer = _calling_trainer()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work before the first step, and switch on the fast scan."""
        self._trainer = _calling_trainer() or self._trainer
        _refuse_engines(args, self._trainer() if self._trainer else None)
        model = kwargs["model"]
        choices = check_settings(model, self.config, calibrated=True)
        self._needs_data = any(choice.needs_data for choice in choices)
        self._steps = cut_steps(self.config, state.max_steps)
        self.events = []
        self._last_cut = _last_cut_before(model, state.global_step)
        stateful: Any = state.stateful_callbacks
        stateful.setdefault(type(self).__name__, self.state())  # absent in checkpoints of runs without the callback
        enable_fast_selective_scan()
        logger.info(f"CompreSSM cuts after steps {', '.join(map(str, self._steps))} of {state.max_steps}.")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut, if the step before was one of the schedule's."""
        if state.global_step not in self._steps:
            return
        calibration = self._calibration(args, state, kwargs["train_dataloader"]) if self._needs_data else None
        result = compress(kwargs["model"], self.config, calibration, kwargs["optimizer"], state.global_step)
        event = CutEvent(state.global_step, result)
        self.events.append(event)
        if result.changed:
            self._last_cut = state.global_step
        self._report(event, args)

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so loudly if nothing was cut."""
        if not self.events and _last_cut_before(kwargs["model"], state.global_step) is None:
            logger.warning(
                f"CompreSSM cut nothing: training ended at step {state.global_step}, before the first of its cuts "
                f"(after steps {', '.join(map(str, self._steps))})."
            )
        elif self.events and not any(event.result.changed for event in self.events):
            reasons = {f"{layer.name}: {layer.reason}" for layer in self.events[-1].result.plan.layers}
            logger.warning(
                f"CompreSSM tried {len(self.events)} cut(s) and none shrank a layer ({'; '.join(sorted(reasons))}). "
                f"A larger {self.config.rank_rule} would cut more."
            )

    def _calibration(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> list[Mapping[str, Any]]:
        """Batches of the run's own data; another sample at each cut, the same one when a run is resumed."""
        batch_size = state.train_batch_size or args.per_device_train_batch_size
        seed = self.config.sampling_seed + state.global_step
        return sample_batches(dataloader, batch_size, self.config.calibration_batches, seed)

    def _rewarmup_share(self, step: int) -> float:
        """Share of the learning rate in the step that follows `step` done steps: 1 / (n + 1), ..., n / (n + 1), 1."""
        if self._last_cut is None or self.config.rewarmup_steps == 0:
            return 1.0
        return min((step - self._last_cut + 1) / (self.config.rewarmup_steps + 1), 1.0)

    def _report(self, event: CutEvent, args: TrainingArguments) -> None:
        """Log the cut through the Trainer."""
        trainer = self._trainer() if self._trainer else None
        if trainer is not None:
            trainer.log(scalars(event))
        sizes = ", ".join(
            f"{layer.name} {layer.state_size} -> {layer.new_state_size}" for layer in event.result.plan.layers
        )
        logger.info(f"CompreSSM cut after step {event.step}: {sizes} ({event.result.seconds:.2f} s).")


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


def _refuse_engines(args: TrainingArguments, trainer: Trainer | None) -> None:
    """Refuse runs whose parameters other processes or engines hold on to."""
    engine = None
    if args.n_gpu > 1:
        engine = "nn.DataParallel (several GPUs in one process)"
    elif trainer is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
    elif args.world_size > 1:
        engine = f"{args.world_size} processes"
    if engine:
        raise ValueError(
            f"CompreSSMCallback cannot cut a model in place under {engine}. Train on one process, or without the "
            "callback and call hf_compressm.compress on the model between two runs."
        )
    if trainer is not None and sum(isinstance(cb, CompreSSMCallback) for cb in trainer.callback_handler.callbacks) > 1:
        raise ValueError("Trainer has two CompreSSMCallbacks; keep one.")
