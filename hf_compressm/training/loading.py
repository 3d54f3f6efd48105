"""Loading checkpoints across cuts inside a Trainer, checking the optimizer's state, and rolling back.

A Trainer loads weights before it calls any callback. A load hook of a module would not be enough: the state dict that
it sees names neither the class nor the record of cuts, and of a sharded checkpoint it sees one part at a time. So the
three methods by which a Trainer loads are wrapped: the model first gets the sizes of the checkpoint's configuration,
and mismatches that the Trainer would ignore are refused.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_compressm.checkpoints import (
    find_last_complete_checkpoint,
    fit_to_checkpoint,
    fit_with_adapters,
    load_converted,
    read_saved,
)
from hf_compressm.files.names import ADAPTER_FILE
from hf_compressm.peft import is_wrapped
from hf_compressm.surgery import misfit, rebuild_reducers, reset, unwrap
from hf_compressm.training.trainer import wrap_methods


logger = logging.get_logger(__name__)

_LOADED = "_compressm_loaded"


class CheckpointLoader:
    """A wrapper of a Trainer's methods that load.

    Args:
        trainer: the Trainer whose methods are wrapped.
        allow_optimizer_reset: whether optimizer state that is missing or does not fit is dropped instead of refused.
        best_loaded: called with the checkpoint's directory when the Trainer has loaded its best model.
    """

    def __init__(self, trainer: Trainer, allow_optimizer_reset: bool, best_loaded: Callable[[Path], None]) -> None:
        self._trainer = trainer
        self._best_loaded = best_loaded
        self._allow_optimizer_reset = allow_optimizer_reset
        wrap_methods(
            trainer,
            {
                "_load_from_checkpoint": self._load_model,
                "_load_best_model": self._load_best_model,
                "_load_optimizer_and_scheduler": self._load_optimizer_and_scheduler,
            },
        )

    @property
    def directory(self) -> Path | None:
        """Directory of the checkpoint whose weights the Trainer loaded last."""
        return vars(self._trainer).get(_LOADED)

    def roll_back(self, folder: Path) -> None:
        """Return weights, sizes and optimizer moments to a checkpoint; steps, scheduler and data order continue.

        Raises:
            ValueError: naming the file, if the checkpoint is not whole.
        """
        read_saved(folder)
        self._trainer._load_from_checkpoint(str(folder))
        optimizer = unwrap(self._trainer.optimizer)
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, present in zip(optimizer.param_groups, options, strict=True):
            group.update(present)  # learning rates stay: the scheduler continues
        problem = misfit(optimizer)
        if problem:
            raise ValueError(f"{folder / OPTIMIZER_NAME} does not fit the model: {problem}")

    def _load_model(self, method: Callable[..., None], directory: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint into a model of any state size.

        Raises:
            ValueError: naming the file, if the checkpoint is not whole or is of another kind of model.
        """
        vars(self._trainer)[_LOADED] = Path(directory)
        if not self._fit(self._trainer.model if model is None else model, directory):
            method(directory, model)
        rebuild_reducers(self._trainer.model_wrapped)  # an earlier `train()` may have wrapped it

    def _load_best_model(self, method: Callable[[], None]) -> None:
        """Load the weights of the best checkpoint, from before a cut or after it."""
        best = self._trainer.state.best_model_checkpoint
        if best is None or not self._fit(self._trainer.model, best):
            method()
        rebuild_reducers(self._trainer.model_wrapped)
        if best is not None:
            self._best_loaded(Path(best))

    def _load_optimizer_and_scheduler(self, method: Callable[[str | None], None], checkpoint: str | None) -> None:
        """Load optimizer and scheduler of a checkpoint.

        Raises:
            ValueError: if the optimizer's state is missing or does not fit the model, unless it may be reset.
        """
        if checkpoint is None or self._is_engine():
            method(checkpoint)
            return
        missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (Path(checkpoint) / name).is_file()]
        if missing:
            self._reset_or_raise(checkpoint, f"{Path(checkpoint) / missing[0]} is missing")
            return
        args = self._trainer.args
        if args.device.type == "cpu":  # with several processes it is "cpu:0", to which torch.load cannot load
            vars(args)["_setup_devices"] = torch.device("cpu")
        try:
            method(checkpoint)
            problem = misfit(unwrap(self._trainer.optimizer))
        except (ValueError, KeyError, RuntimeError) as error:
            problem = str(error)
        if problem:
            self._reset_or_raise(checkpoint, f"{Path(checkpoint) / OPTIMIZER_NAME} does not fit the model: {problem}")

    def _fit(self, model: nn.Module | None, directory: str) -> bool:
        """Give the model the checkpoint's sizes; returns whether its weights were loaded here already."""
        if model is None or self._is_engine() or ((Path(directory) / ADAPTER_FILE).exists() and not is_wrapped(model)):
            return False
        try:
            saved = read_saved(directory)
            if is_wrapped(model):
                fit_with_adapters(model, saved, self._trainer.optimizer)
            else:
                fit_to_checkpoint(model, saved, self._trainer.optimizer)
        except ValueError as error:
            last = find_last_complete_checkpoint(Path(directory).parent)
            raise ValueError(f"{error}{f' The last complete checkpoint is {last}.' if last else ''}") from error
        return isinstance(model, PreTrainedModel) and load_converted(model, saved)

    def _is_engine(self) -> bool:
        return bool(self._trainer.is_deepspeed_enabled or self._trainer.is_fsdp_enabled)

    def _reset_or_raise(self, checkpoint: str, problem: str) -> None:
        """Continue without the optimizer's state, but with the scheduler's, if that is allowed; otherwise raise."""
        if not self._allow_optimizer_reset:
            raise ValueError(
                f"{problem}. Resume from a checkpoint that has it, or pass allow_optimizer_reset=True to go on with "
                "fresh moments."
            )
        logger.warning(f"{problem}. The optimizer starts with fresh moments.")
        reset(unwrap(self._trainer.optimizer))
        scheduler = Path(checkpoint) / SCHEDULER_NAME
        if scheduler.is_file() and self._trainer.lr_scheduler is not None:
            self._trainer.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
