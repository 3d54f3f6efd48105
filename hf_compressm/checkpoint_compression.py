"""Cutting a checkpoint on disk: between two launches of a run whose model cannot be cut in place, or after training.

The new checkpoint is one from which training goes on: weights, configuration, optimizer state and history are those
that a cut in place after the same step would have left, and everything else is copied.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from hf_compressm.checkpoints import (
    ADAPTER_FILE,
    BASE_FOLDER,
    HISTORY_FILE,
    SEAL,
    TRAINER_STATE_FILE,
    seal_checkpoint,
)
from hf_compressm.compression import CompressionResult, compress
from hf_compressm.compression.record import is_count
from hf_compressm.config import CompreSSMConfig
from hf_compressm.durable import new_directory, quoted, read_json, write_json, write_text
from hf_compressm.fsdp_checkpoints import FULL, SHARDED, Layout, find_layout, plain_weights, read_state, write_state
from hf_compressm.history import CALLBACK, CutEvent, from_record, to_record
from hf_compressm.loading import load_model, verify_checkpoint
from hf_compressm.reporting.cards import CARD_FILE, FIGURES_FOLDER, card_of
from hf_compressm.reporting.pages import HTML_FILE, MARKDOWN_FILE, PICTURES_FOLDER
from hf_compressm.saved_optimizers import SavedOptimizer, fill_with_zeros, restore_saved, to_saved


logger = logging.get_logger(__name__)

ANEW = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|_fsdp_\w+\.py")
"""Weights, and the files of torch that transformers takes for the code of a model that FSDP2 has wrapped."""
DEEPSPEED = ("zero_to_fp32.py", "latest", "global_step*")


def compress_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> CompressionResult:
    """Cut a Trainer's checkpoint, or a saved model, so that the next launch goes on with the smaller model.

    The model is loaded and measured on the CPU. Checkpoints of FSDP are read and written as FSDP does, see
    `hf_compressm.fsdp_checkpoints`; those with sharded weights need a `config.json` beside them.

    To resume with `Trainer.train(resume_from_checkpoint=output)`, build the model from `output`; with
    `CompreSSMCallback` a model of the original size will do. Call `output` `<output_dir>/checkpoint-<step>`, with the
    same step, for `resume_from_checkpoint=True` and `find_last_complete_checkpoint` to see it.

    Args:
        checkpoint: a `checkpoint-<step>` directory of a Trainer, or what `save_pretrained` wrote. It stays as it is.
        output: directory of the new one; it is there whole and sealed, or not at all.
        config: settings; those of the schedule are not used here. `optimizer_state="reset"` goes on where the saved
            optimizer state cannot be matched to parameters: all moments are then dropped.
        calibration: iterable of model-input dicts, needed by selective layers.

    Returns:
        What was done, as of `compress`.

    Raises:
        ValueError: if the checkpoint is not whole, or not of a kind that can be cut on disk (DeepSpeed, adapters of
            PEFT); if it is not clear beyond doubt which parameters the optimizer's state belongs to; if `output` has
            something in it or lies inside the checkpoint; and as `compress`. Nothing is then written.
        OSError: from the file system; likewise.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    _check_places(checkpoint, output)
    _refuse_other_kinds(checkpoint)
    layout = find_layout(checkpoint)
    with plain_weights(checkpoint, layout) as source:
        verify_checkpoint(source)
        model = load_model(source)
    progress = _Progress.read(checkpoint)
    state = _OptimizerState.read(checkpoint, layout, model, config)
    result = compress(model, config, calibration, state.optimizer, progress.step)
    with new_directory(output) as folder:
        _copy_the_rest(checkpoint, folder)
        model.save_pretrained(folder, **_shard_size(checkpoint))
        if layout.weights:
            write_state(folder / layout.weights, "model", model.state_dict())
        state.write(folder, model)
        progress.write(folder, result, config)
        _renew_card(folder)
        seal_checkpoint(folder)
    return result


@dataclass(frozen=True)
class _Progress:
    """The Trainer's state, and in it the callback's; empty for a model that was only saved."""

    trainer: dict[str, Any]

    @property
    def step(self) -> int | None:
        """Optimizer steps done."""
        return self.trainer["global_step"] if self.trainer else None

    @classmethod
    def read(cls, checkpoint: Path) -> "_Progress":
        """Read `trainer_state.json`, and make sure that the history in it can be extended."""
        path = checkpoint / TRAINER_STATE_FILE
        progress = cls(read_json(path) if path.exists() else {})
        if path.exists() and not is_count(progress.trainer.get("global_step")):
            raise ValueError(f"{path}: global_step is {quoted(progress.trainer.get('global_step'))}, not a step.")
        recovery = progress._run().get("recovery")
        if isinstance(recovery, Mapping) and recovery.get("pending"):
            raise ValueError(
                f"{checkpoint} was saved while a cut waited for its metric, and may yet be rolled back. Cut a "
                "checkpoint from after recovery_steps."
            )
        from_record(progress._run())
        return progress

    def write(self, folder: Path, result: CompressionResult, config: CompreSSMConfig) -> None:
        """Add the cut to the history, so that a callback that goes on from here takes it for its own."""
        if self.step is None:
            return
        run = self._run()
        run |= to_record([*from_record(run), CutEvent(self.step, result)])
        callbacks = self._callbacks()
        own = callbacks.get(CALLBACK, {"args": {"config": config.to_dict()}, "attributes": {}})
        trainer = {**self.trainer, "stateful_callbacks": {**callbacks, CALLBACK: {**own, "run": run}}}
        write_json(folder / HISTORY_FILE, run)
        text = json.dumps(trainer, indent=2, sort_keys=True) + "\n"  # its log may hold NaN, as the Trainer writes it
        (folder / TRAINER_STATE_FILE).write_text(text, encoding="utf-8")

    def _callbacks(self) -> dict[str, Any]:
        callbacks = self.trainer.get("stateful_callbacks")
        return callbacks if isinstance(callbacks, dict) else {}

    def _run(self) -> dict[str, Any]:
        """History of the run so far, as the callback keeps it."""
        saved = self._callbacks().get(CALLBACK)
        run = saved.get("run") if isinstance(saved, Mapping) else None
        return dict(run) if isinstance(run, Mapping) else to_record([])


@dataclass(frozen=True)
class _OptimizerState:
    """What was saved of the optimizer (None if nothing was), and one made of it if its parameters are known."""

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
        """Write the state after the cut; groups without moments if it was dropped, so that the scheduler goes on."""
        if not self.layout.optimizer:
            return
        state = self._cut_state(model)
        if state is not None:
            write_state(folder / self.layout.optimizer, "optimizer", state)
        else:
            logger.warning(
                "Nothing could be kept of the optimizer: a Trainer starts optimizer and scheduler anew; with "
                "CompreSSMCallback and allow_optimizer_reset=True the scheduler goes on."
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
    """Raise `ValueError` unless there is a checkpoint, and room for another one."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a directory; a checkpoint of a Trainer or a saved model is needed.")
    if output.resolve().is_relative_to(checkpoint.resolve()):
        raise ValueError(f"output {output} is {checkpoint} or inside it; a checkpoint is not cut in its own place.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output {output} is there already, with something in it. Name a new directory.")


def _refuse_other_kinds(checkpoint: Path) -> None:
    """Raise `ValueError` for checkpoints whose model or optimizer state is not in files that can be cut."""
    found = [path.name for pattern in DEEPSPEED for path in sorted(checkpoint.glob(pattern))]
    if found:
        raise ValueError(
            f"{checkpoint} is a checkpoint of DeepSpeed ({found[0]}), whose optimizer state is in parts that cannot "
            "be cut. Make whole weights of it with its own zero_to_fp32.py (--safe_serialization), put them and its "
            "config.json into a new directory, cut that, and train on from there with a fresh optimizer."
        )
    adapters = [path for name in (ADAPTER_FILE, "adapter_config.json") for path in checkpoint.glob(f"**/{name}")]
    if adapters:
        place = f"the base in {BASE_FOLDER}" if (checkpoint / BASE_FOLDER).is_dir() else "the base"
        raise ValueError(
            f"{checkpoint} holds adapters of PEFT, which are not cut on disk. Merge them into {place} "
            "(merge_and_unload), save that with save_pretrained and cut it; or cut in place with CompreSSMCallback."
        )


def _copy_the_rest(checkpoint: Path, folder: Path) -> None:
    """Copy all files but those that a cut writes anew, byte for byte: none is read."""
    anew = {CONFIG_NAME, OPTIMIZER_NAME, TRAINER_STATE_FILE, HISTORY_FILE, SEAL, *FULL, *SHARDED}
    anew |= {HTML_FILE, MARKDOWN_FILE, PICTURES_FOLDER, FIGURES_FOLDER}  # of the run up to here
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        if path.is_file() and name.parts[0] not in anew and not ANEW.fullmatch(str(name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)


def _renew_card(folder: Path) -> None:
    """Let a model card that came along tell of this cut too."""
    path = folder / CARD_FILE
    if not path.is_file():
        return
    try:
        write_text(path, card_of(folder) or "")
    except ValueError as error:
        logger.warning(f"{CARD_FILE} stays as it was, since it cannot be read: {error}")


def _shard_size(checkpoint: Path) -> dict[str, Any]:
    """Shards as large as those of a checkpoint that has several; transformers' own choice for one that has not."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        return {}
    shards = {checkpoint / name for name in read_json(index)["weight_map"].values()}
    return {"max_shard_size": max(shard.stat().st_size for shard in shards)}
