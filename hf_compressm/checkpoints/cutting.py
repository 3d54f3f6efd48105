"""Cutting a checkpoint on disk: between two launches of a run whose model cannot be cut in place, or after training.

Training can resume from the new checkpoint: its weights, configuration, optimizer state and history are those that a
cut in place after the same step would have left, and everything else is copied.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import logging

from hf_compressm.checkpoints.fsdp import FULL, SHARDED, Layout, find_layout, plain_weights, read_state, write_state
from hf_compressm.checkpoints.optimizer_state import SavedOptimizer, fill_with_zeros, restore_saved, to_saved
from hf_compressm.checkpoints.reading import read_saved
from hf_compressm.checkpoints.seal import seal_checkpoint
from hf_compressm.compression import CompressionResult, compress
from hf_compressm.compression.history import CALLBACK, CutEvent, from_record, read_history, to_record
from hf_compressm.config import CompreSSMConfig
from hf_compressm.files.atomic import new_directory, read_json, write_json, write_text
from hf_compressm.files.names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    BASE_FOLDER,
    CONFIG_FILE,
    FIGURES_FOLDER,
    HISTORY_FILE,
    OLD_REPORT,
    REPORT_FILE,
    SEAL,
    TRAINER_STATE_FILE,
)
from hf_compressm.files.places import check_new_directory
from hf_compressm.files.weights import Headers
from hf_compressm.utils.checks import is_count, quoted


logger = logging.get_logger(__name__)

ANEW = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|_fsdp_\w+\.py")
"""Weights, and files of torch that transformers mistakes for the code of a model that FSDP2 has wrapped."""
DEEPSPEED = ("zero_to_fp32.py", "latest", "global_step*")


def cut_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> CompressionResult:
    """Cut a Trainer's checkpoint, or a saved model, so that the next launch continues with the smaller model.

    Args:
        checkpoint: as in `hf_compressm.compress_checkpoint`, like the next three.
        output: likewise.
        config: likewise.
        calibration: likewise.
        finish: called with the new directory before it is sealed, to add files about the model.

    Returns:
        What was done, as from `compress`.

    Raises:
        ValueError: as `hf_compressm.compress_checkpoint`; nothing is then written.
        OSError: from the file system; likewise.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    _check_places(checkpoint, output)
    _refuse_other_kinds(checkpoint)
    layout = find_layout(checkpoint)
    with plain_weights(checkpoint, layout) as source:
        saved = read_saved(source)
        model, shards = saved.load(), _shard_size(saved.headers)
    progress = _Progress.read(checkpoint, saved.trainer_state)
    state = _OptimizerState.read(checkpoint, layout, model, config)
    result = compress(model, config, calibration, state.optimizer, progress.step)
    with new_directory(output) as folder:
        _copy_the_rest(checkpoint, folder)
        model.save_pretrained(folder, **shards)
        if layout.weights:
            write_state(folder / layout.weights, "model", model.state_dict())
        state.write(folder, model)
        progress.write(folder, result, config)
        finish(folder)
        seal_checkpoint(folder)
    return result


@dataclass(frozen=True)
class _Progress:
    """The progress of a run: the Trainer's state and the history of cuts; both empty for a model without a run."""

    trainer: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def step(self) -> int | None:
        """Optimizer steps done."""
        return self.trainer["global_step"] if self.trainer else None

    @classmethod
    def read(cls, checkpoint: Path, trainer: Mapping[str, Any] | None) -> "_Progress":
        """Read the Trainer's state, and make sure that the history can be extended."""
        path = checkpoint / TRAINER_STATE_FILE
        if trainer is None and path.exists():  # FSDP's weights were read from another place
            trainer = read_json(path)
        run = read_history(checkpoint, trainer)
        progress = cls(trainer or {}, run or to_record([]))
        if trainer is not None and not is_count(trainer.get("global_step")):
            raise ValueError(f"{path}: global_step is {quoted(trainer.get('global_step'))}, not a step.")
        recovery = progress.run.get("recovery")
        if isinstance(recovery, Mapping) and recovery.get("pending"):
            raise ValueError(
                f"{checkpoint} was saved while a cut waited for its metric, and may still be rolled back. Cut a "
                "checkpoint from after recovery_steps."
            )
        from_record(progress.run)
        return progress

    def write(self, folder: Path, result: CompressionResult, config: CompreSSMConfig) -> None:
        """Add the cut to the history, so that a callback that resumes from here treats it as one of its own."""
        if self.step is None:
            return
        write_json(
            folder / HISTORY_FILE, {**self.run, **to_record([*from_record(self.run), CutEvent(self.step, result)])}
        )
        callbacks = self.trainer.get("stateful_callbacks")
        callbacks = callbacks if isinstance(callbacks, dict) else {}
        own = callbacks.get(CALLBACK)
        own = own if isinstance(own, dict) else {"args": {"config": config.to_dict()}, "attributes": {}}
        own = {name: value for name, value in own.items() if name != "run"}  # where earlier versions kept the history
        trainer = {**self.trainer, "stateful_callbacks": {**callbacks, CALLBACK: own}}
        text = json.dumps(trainer, indent=2, sort_keys=True) + "\n"  # its log may hold NaN, as the Trainer writes it
        write_text(folder / TRAINER_STATE_FILE, text)


@dataclass(frozen=True)
class _OptimizerState:
    """The saved optimizer state, None if there is none; and an optimizer with it if its parameters are known."""

    layout: Layout
    saved: dict[str, Any] | None
    optimizer: SavedOptimizer | None
    parameters: int

    @classmethod
    def read(
        cls, checkpoint: Path, layout: Layout, model: PreTrainedModel, config: CompreSSMConfig
    ) -> "_OptimizerState":
        """Read the state, and find its parameters."""
        path, parameters, saved = checkpoint / layout.optimizer, len(list(model.parameters())), None
        if not layout.optimizer:
            return cls(layout, None, None, parameters)
        try:
            saved = read_state(path, "optimizer")
            return cls(layout, saved, restore_saved(saved, model), parameters)
        except ValueError as error:
            if config.optimizer_state != "reset":
                raise ValueError(
                    f"{path} cannot be carried over the cut. {error} Pass optimizer_state='reset' to go on with fresh "
                    "moments, or cut in place with CompreSSMCallback."
                ) from error
            logger.warning(f"{path}: all moments are dropped, since it cannot be carried over the cut. {error}")
            return cls(layout, saved, None, parameters)

    def write(self, folder: Path, model: PreTrainedModel) -> None:
        """Write the state after the cut; if it was dropped, groups without moments, so that the scheduler resumes."""
        if not self.layout.optimizer:
            return
        state = self._cut_state(model)
        if state is not None:
            write_state(folder / self.layout.optimizer, "optimizer", state)
        else:
            logger.warning(
                "Nothing of the optimizer's state could be kept: a Trainer starts optimizer and scheduler anew; with "
                "CompreSSMCallback and allow_optimizer_reset=True the scheduler continues."
            )

    def _cut_state(self, model: PreTrainedModel) -> dict[str, Any] | None:
        if self.saved is not None and self.optimizer is not None:
            if self.layout.is_fsdp:
                fill_with_zeros(self.optimizer)
            return to_saved(self.optimizer, self.saved, model)
        known = self.saved is not None and not self.layout.is_fsdp and isinstance(self.saved.get("param_groups"), list)
        if known and len(list(model.parameters())) == self.parameters:  # new ones would belong to no group
            return {**(self.saved or {}), "state": {}}
        return None


def _check_places(checkpoint: Path, output: Path) -> None:
    """Raise `ValueError` unless the checkpoint exists and the output is free."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a directory; a checkpoint of a Trainer or a saved model is needed.")
    check_new_directory(output, checkpoint)


def _refuse_other_kinds(checkpoint: Path) -> None:
    """Raise `ValueError` for checkpoints whose model or optimizer state is not in files that can be cut."""
    found = [path.name for pattern in DEEPSPEED for path in sorted(checkpoint.glob(pattern))]
    if found:
        raise ValueError(
            f"{checkpoint} is a checkpoint of DeepSpeed ({found[0]}), whose optimizer state is in parts that cannot "
            "be cut. Convert it to whole weights with its own zero_to_fp32.py (--safe_serialization), put them and "
            "its config.json into a new directory, cut that, and train on from there with a fresh optimizer."
        )
    adapters = [path for name in (ADAPTER_FILE, ADAPTER_CONFIG) for path in checkpoint.glob(f"**/{name}")]
    if adapters:
        place = f"the base in {BASE_FOLDER}" if (checkpoint / BASE_FOLDER).is_dir() else "the base"
        raise ValueError(
            f"{checkpoint} holds adapters of PEFT, which are not cut on disk. Merge them into {place} "
            "(merge_and_unload), save that with save_pretrained and cut it; or cut in place with CompreSSMCallback."
        )


def _copy_the_rest(checkpoint: Path, folder: Path) -> None:
    """Copy all files except those that a cut writes anew, byte for byte: none is interpreted."""
    anew = {CONFIG_FILE, OPTIMIZER_NAME, TRAINER_STATE_FILE, HISTORY_FILE, SEAL, *FULL, *SHARDED}
    anew |= {REPORT_FILE, *OLD_REPORT, FIGURES_FOLDER}  # these describe the run up to here
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        if path.is_file() and name.parts[0] not in anew and not ANEW.fullmatch(str(name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)


def _shard_size(headers: Headers) -> dict[str, Any]:
    """Arguments for shards as large as the checkpoint's if it has several; else none, so that transformers decides."""
    shards = {header.file for header in headers.values()}
    return {"max_shard_size": max(shard.stat().st_size for shard in shards)} if len(shards) > 1 else {}
