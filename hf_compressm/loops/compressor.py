"""Cutting in a training loop of one's own, in one of Accelerate, or in Lightning: one call after every step."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers.utils import logging

from hf_compressm.checkpoints import fit_to_sizes
from hf_compressm.compression.history import CutEvent
from hf_compressm.compression.log import scalars, sentence
from hf_compressm.config import CompreSSMConfig, Settings, as_config
from hf_compressm.loops.calibration import Calibration, refuse_loader
from hf_compressm.loops.decisions import Decisions
from hf_compressm.loops.engines import called_model, inner_model
from hf_compressm.loops.forwards import ForwardBatches
from hf_compressm.loops.refusals import check_loop, last_step
from hf_compressm.loops.remembering import read_batches, read_step, remembered
from hf_compressm.surgery import rebuild_reducers, unwrap
from hf_compressm.utils.processes import Processes
from hf_compressm.utils.randomness import undisturbed


logger = logging.get_logger(__name__)


class Compressor:
    """Cuts a model's SSM layers while a loop of one's own trains it, as `CompreSSMCallback` does in a `Trainer`.

    Call `step()` after every step of optimizer and scheduler. A cut that is due happens there: parameters, the
    optimizer's moments and the model's configuration shrink together, and the loop goes on with the same objects. With
    the same data and seeds, the loop ends bit for bit where a `Trainer` with the callback ends.

    With Accelerate, pass model and optimizer as `accelerator.prepare` returns them. Inside `accelerator.accumulate`,
    calls of `step` that end no optimizer step count for nothing. All processes call `step` together.

    A fast scan is enabled for models without a kernel, as the callback does (`enable_fast_selective_scan`).

    Args:
        model: any module with SSM layers of a known family, perhaps inside DistributedDataParallel or
            `torch.compile`; cut in place.
        config: settings, as an object, a mapping, or the path of a YAML or JSON file.
        optimizer: the optimizer that trains the model, or a list of several; its state is carried over every cut.
        calibration: batches of model inputs on which layers are measured, such as a DataLoader; the first
            `calibration_batches` of them are used at each cut. By default the loop's own: what the model was called
            with in training mode in the steps just before a cut, run again in evaluation mode without gradients.
        total_steps: optimizer steps of the whole run, of which settings below 1 are a share.
        held_out_loss: for `max_loss_increase`: a function without arguments that returns the loss on held-out data;
            it is called in evaluation mode without gradients, before and after a cut, in every process. By default
            the loss that the model itself returns for the batches of the steps just before the cut.

    Attributes:
        events: attempts to cut, oldest first, including those from before a resume and those that were undone.
        steps: optimizer steps done.
        logs: what the last call of `step` has to log, by the names that the Trainer's log has; mostly empty.

    Raises:
        ValueError: if a setting does not fit the model or a loop, no cut could ever happen, a guard could not work, or
            the model cannot be cut in place; from the first `step`, if its batch cannot be measured on.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Settings = None,
        optimizer: Any = None,
        calibration: Iterable[Any] | None = None,
        *,
        total_steps: int | None = None,
        held_out_loss: Callable[[], float] | None = None,
    ) -> None:
        self._config = as_config(config)
        self._wrapped, self._model, self._optimizer = model, inner_model(model), optimizer
        self._processes = Processes.current()
        self._held_out_loss = held_out_loss
        self._total_steps = total_steps
        self.steps = 0
        self.logs: dict[str, float] = {}
        refuse_loader(calibration)
        check_loop(self._model, model, self._config, optimizer, held_out_loss is not None)
        self._end = last_step(self._config, total_steps)
        self._batches = ForwardBatches(called_model(model), steps_done := _steps_of(self))
        self._calibration = Calibration(self._batches, calibration)
        self._calibration.begin(self._model, self._config, self._judges, self._processes)
        self._decisions = Decisions(self._config)
        trigger = self._decisions.begin(self._model, self._calibration, self._end, self._processes)
        self._go_on()
        if self._config.rewarmup_steps and optimizer is not None:
            for each in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
                for hook in self._decisions.rewarmup.follow(unwrap(each), steps_done):
                    weakref.finalize(self, hook.remove)  # another Compressor may take over
        if self._processes.is_first:
            logger.info(f"CompreSSM cuts {trigger.describe()}.")

    @property
    def config(self) -> CompreSSMConfig:
        """The settings of the run."""
        return self._config

    @property
    def events(self) -> list[CutEvent]:
        """Attempts to cut, oldest first, including those from before a resume and those that were undone."""
        return self._decisions.events

    def step(self) -> list[CutEvent]:
        """Count an optimizer step, and cut if a cut is due.

        Returns:
            The attempts to cut after this step: mostly none; more than one where a guard has undone some.

        Raises:
            ValueError: if the batch of the first step cannot be measured on, or NaN or Inf is found under
                `on_nonfinite="raise"`.
        """
        self.logs = {}
        if _accumulates(self._optimizer):
            return []
        self.steps += 1
        self._calibration.step_ends(self._model, self._processes)
        self.logs |= self._decisions.observe(self.steps)
        events = self._cut() if self.steps < self._end and self._decisions.cut_follows(self.steps) else []
        self._look_ahead()
        self._tell(events)
        return events

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep: plain values, and the tensors of the last batches where a cut is near.

        `torch.load(..., weights_only=True)` reads it again. Call it after `step`; with several processes each has
        batches of its own, and the first one's state serves all if none is near a cut.
        """
        return remembered(self._decisions, self._batches, self._model, self.steps, self._processes)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned, and give the model the state sizes that it had then.

        Call it before the states of model and optimizer are loaded, since these need the sizes:

            compressor.load_state_dict(checkpoint["compressor"])
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])

        Args:
            state: a state of the same settings; the model may have any state size.

        Raises:
            ValueError: if it is not a state of a `Compressor`, or one of another kind of model.
        """
        step = read_step(state)
        parts, autocast = read_batches(state, self._processes, next(self._model.parameters()).device)
        self._decisions.restore(state)
        fit_to_sizes(self._model, state.get("model"), self._optimizer)
        rebuild_reducers(self._wrapped)
        self._batches.begin(self._batches.count)
        self._batches.resume(parts)
        self._batches.autocast = autocast
        self.steps = step
        self._go_on()

    @property
    def _judges(self) -> bool:
        """Whether the loss of the loop's own batches decides if a cut is kept."""
        return self._config.max_loss_increase is not None and self._held_out_loss is None

    def _go_on(self) -> None:
        """Continue after the steps that are done."""
        self._decisions.go_on(self._model, self.steps)
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Keep the batches of the next step if the model is about to be measured."""
        following = self._decisions.next_look(self.steps) if self.steps < self._end else None
        self._calibration.step_begins(self.steps, following)

    def _cut(self) -> list[CutEvent]:
        """Cut under the guard; without any batch, first wait for one more step."""
        if self._decisions.must_wait(self.steps, self._calibration, self._processes):
            return []
        request = self._calibration.request(
            self._processes,
            optimizer=self._optimizer,
            step=self.steps,
            reduction_share=self._decisions.reduction_share,
        )
        loss = self._loss if self._config.max_loss_increase is not None else None
        return self._decisions.cut(self._model, request, loss, self._wrapped)

    def _loss(self) -> float:
        """The held-out loss of the model as it is, the same in all processes."""
        with self._processes.together(), undisturbed(self._model), torch.no_grad():
            if self._held_out_loss is not None:
                losses = [float(self._held_out_loss())]
            else:
                losses = [float(self._batches.loss(self._model, batch).mean()) for batch in self._batches]
        every = [one for part in self._processes.gather(losses) for one in part]
        return sum(every) / max(len(every), 1)

    def _tell(self, events: list[CutEvent]) -> None:
        """Tell of attempts to cut, at the end of a run without any, and of steps beyond its end."""
        for event in events:
            self.logs |= scalars(event)
            if self._processes.is_first:
                logger.info(sentence(event))
        if self.steps == self._end and self._processes.is_first:
            self._decisions.tell_outcome(self._model, self.steps)
        if self._total_steps is not None and self.steps == self._total_steps + 1 and self._processes.is_first:
            logger.warning(
                f"This is step {self.steps} of a run with total_steps={self._total_steps}. Nothing is cut any more; "
                "pass the true number of steps, of which settings below 1 are a share."
            )


def _steps_of(compressor: Compressor) -> Callable[[], int]:
    """A function that returns its steps, and does not keep it alive."""
    known = weakref.ref(compressor)
    return lambda: 0 if (present := known()) is None else present.steps


def _accumulates(optimizer: Any) -> bool:
    """Whether accelerate has left out the optimizer's step, since gradients are still being accumulated."""
    optimizers = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    return any(isinstance(o, AcceleratedOptimizer) and not o.gradient_state.sync_gradients for o in optimizers)
