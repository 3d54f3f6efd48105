"""Checkpoints across cuts inside a Trainer: loading, checking the optimizer's state, and going back.

A Trainer loads weights before it calls any callback, and the state dict that a module's load hook sees says neither
which class nor which record of cuts belongs to it; of a sharded checkpoint it sees a part at a time. So the three
methods by which a Trainer loads are stood in front of: the model gets the sizes of the checkpoint's configuration
first, and what the Trainer would pass over in silence is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_compressm.adapters import is_wrapped
from hf_compressm.checkpoints import ADAPTER_FILE, find_last_complete_checkpoint, verify_files
from hf_compressm.loading import fit_to_checkpoint, fit_with_adapters, load_converted
from hf_compressm.surgery import misfit, rebuild_reducers, reset, unwrap


logger = logging.get_logger(__name__)


class CheckpointLoader:
    """Stands in front of a Trainer's methods that load, once for each Trainer.

    Args:
        trainer: whose methods are stood in front of.
        allow_optimizer_reset: whether optimizer state that is missing or does not fit is dropped instead of refused.
    """

    def __init__(self, trainer: Trainer, allow_optimizer_reset: bool) -> None:
        """Take the Trainer's methods."""
        self.trainer = trainer
        self.allow_optimizer_reset = allow_optimizer_reset
        names = ("_load_from_checkpoint", "_load_best_model", "_load_optimizer_and_scheduler")
        absent = [name for name in names if not callable(getattr(trainer, name, None))]
        if absent:
            raise ValueError(
                f"This version of transformers has no Trainer.{absent[0]}, by which checkpoints across cuts are "
                "loaded. Use a version that hf_compressm names in its requirements."
            )
        self._load_model: Callable[..., None] = trainer._load_from_checkpoint
        self._load_best: Callable[[], None] = trainer._load_best_model
        self._load_optimizer: Callable[[Any], None] = trainer._load_optimizer_and_scheduler
        vars(trainer).update(
            _load_from_checkpoint=self.load_model,
            _load_best_model=self.load_best_model,
            _load_optimizer_and_scheduler=self.load_optimizer_and_scheduler,
        )

    def load_model(self, directory: str, model: nn.Module | None = None) -> None:
        """Weights of a checkpoint, into a model of any state size.

        Raises:
            ValueError: naming the file, if the checkpoint is not whole or is of another kind of model.
        """
        target = self.trainer.model if model is None else model
        if not self._fit(target, directory):
            self._load_model(directory, model)
        rebuild_reducers(self.trainer.model_wrapped)  # an earlier `train()` may have wrapped it

    def load_best_model(self) -> None:
        """Weights of the best checkpoint, from before a cut or after it."""
        best = self.trainer.state.best_model_checkpoint
        if best is None or not self._fit(self.trainer.model, best):
            self._load_best()
        rebuild_reducers(self.trainer.model_wrapped)

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Optimizer and scheduler of a checkpoint.

        Raises:
            ValueError: if the optimizer's state is missing or does not fit the model, unless it may be reset.
        """
        if checkpoint is None or self._is_engine():
            self._load_optimizer(checkpoint)
            return
        missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (Path(checkpoint) / name).is_file()]
        if missing:
            self._reset_or_raise(checkpoint, f"{Path(checkpoint) / missing[0]} is missing")
            return
        args = self.trainer.args
        if args.device.type == "cpu":  # in one of several processes it is "cpu:0", to which torch.load cannot load
            vars(args)["_setup_devices"] = torch.device("cpu")
        try:
            self._load_optimizer(checkpoint)
            problem = misfit(unwrap(self.trainer.optimizer))
        except (ValueError, KeyError, RuntimeError) as error:
            problem = str(error)
        if problem:
            self._reset_or_raise(checkpoint, f"{Path(checkpoint) / OPTIMIZER_NAME} does not fit the model: {problem}")

    def roll_back(self, folder: Path) -> None:
        """Return weights, sizes and optimizer moments to a checkpoint; steps, scheduler and data order go on.

        Raises:
            ValueError: naming the file, if the checkpoint is not whole.
        """
        verify_files(folder)
        self.load_model(str(folder))
        optimizer = unwrap(self.trainer.optimizer)
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        groups = optimizer.state_dict()["param_groups"]  # present learning rates stay: the scheduler goes on
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        problem = misfit(optimizer)
        if problem:
            raise ValueError(f"{folder / OPTIMIZER_NAME} does not fit the model: {problem}")

    def _fit(self, model: nn.Module | None, directory: str) -> bool:
        """Give the model the checkpoint's sizes; whether its weights were loaded here already."""
        if model is None or self._is_engine() or ((Path(directory) / ADAPTER_FILE).exists() and not is_wrapped(model)):
            return False
        try:
            if is_wrapped(model):
                fit_with_adapters(model, directory, self.trainer.optimizer)
            else:
                fit_to_checkpoint(model, directory, self.trainer.optimizer)
        except ValueError as error:
            last = find_last_complete_checkpoint(Path(directory).parent)
            raise ValueError(f"{error}{f' The last complete checkpoint is {last}.' if last else ''}") from error
        return isinstance(model, PreTrainedModel) and load_converted(model, directory)

    def _is_engine(self) -> bool:
        return bool(self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled)

    def _reset_or_raise(self, checkpoint: str, problem: str) -> None:
        """Go on without the optimizer's state, but with the scheduler's, if that is allowed."""
        if not self.allow_optimizer_reset:
            raise ValueError(
                f"{problem}. Resume from a checkpoint that has it, or pass allow_optimizer_reset=True to go on with "
                "fresh moments."
            )
        logger.warning(f"{problem}. The optimizer starts with fresh moments.")
        reset(unwrap(self.trainer.optimizer))
        scheduler = Path(checkpoint) / SCHEDULER_NAME
        if scheduler.is_file() and self.trainer.lr_scheduler is not None:
            self.trainer.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))


def watch_loading(trainer: Trainer, allow_optimizer_reset: bool) -> CheckpointLoader:
    """The loader that stands in front of a Trainer's methods, put there by the first call."""
    loader = getattr(trainer._load_from_checkpoint, "__self__", None)
    if not isinstance(loader, CheckpointLoader):
        loader = CheckpointLoader(trainer, allow_optimizer_reset)
    loader.allow_optimizer_reset = allow_optimizer_reset
    return loader
