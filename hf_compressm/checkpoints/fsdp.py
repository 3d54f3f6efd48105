"""Weights and optimizer state of a checkpoint, FSDP's included: found, read and written in one process.

| state dict type | weights | optimizer | written by |
|---|---|---|---|
| none: plain, DDP | `model.safetensors` | `optimizer.pt` | `Optimizer.state_dict`, parameters by number |
| `FULL_STATE_DICT` | `pytorch_model_fsdp.bin`, and `model.safetensors` | `optimizer.bin` | parameters by name |
| `SHARDED_STATE_DICT` | `pytorch_model_fsdp_0/` | `optimizer_0/` | `torch.distributed.checkpoint`, likewise |

Tested with checkpoints that FSDP2 wrote and read again in two processes on the CPU (gloo), with the oldest and newest
torch that this package supports. accelerate does not start FSDP on a CPU by itself, so it was told that it has GPUs.
Not tested: GPUs, mixed precision and offloading; and FSDP1, which should write the same files under the same names,
but which accelerate does not run on a CPU.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_compressm.checkpoints.sharded import read_sharded
from hf_compressm.files.atomic import read_json, write_json
from hf_compressm.files.names import CONFIG_FILE
from hf_compressm.files.weights import has_weights
from hf_compressm.utils.checks import quoted


FULL = ("pytorch_model_fsdp.bin", "optimizer.bin")
SHARDED = ("pytorch_model_fsdp_0", "optimizer_0")
CLASS_PREFIX = "FSDP"
"""FSDP2 gives the modules that it wraps new classes, whose names have this prefix."""


@dataclass(frozen=True)
class Layout:
    """Names of what a checkpoint has besides safetensors: FSDP's weights, and the optimizer's state; "" if missing."""

    weights: str
    optimizer: str

    @property
    def is_fsdp(self) -> bool:
        """Whether FSDP wrote it."""
        return bool(self.weights) or self.optimizer in (FULL[1], SHARDED[1])


def find_layout(checkpoint: Path) -> Layout:
    """The layout of a checkpoint, by the files that exist.

    Raises:
        ValueError: if FSDP wrote parts that each belong to one process.
    """
    parts = sorted([*checkpoint.glob("pytorch_model_fsdp*_rank*.bin"), *checkpoint.glob("optimizer_*_rank*.bin")])
    if parts:
        raise ValueError(
            f"{checkpoint} has {parts[0].name}, a part that one process of FSDP wrote for itself, and that no other "
            "can read. Save with fsdp_state_dict_type FULL_STATE_DICT or SHARDED_STATE_DICT."
        )
    weights, optimizer = (
        next((name for name in names if (checkpoint / name).exists()), "")
        for names in ((FULL[0], SHARDED[0]), (OPTIMIZER_NAME, FULL[1], SHARDED[1]))
    )
    return Layout(weights, optimizer)


def read_state(path: Path, key: str) -> Any:
    """A state dict from a file of `torch.save`, or from a directory of `torch.distributed.checkpoint`.

    Code that may be pickled in it is not run. Resuming under FSDP is different: there torch reads it in its own way.

    Args:
        path: of the file or directory.
        key: name under which FSDP keeps it in a directory, `"model"` or `"optimizer"`.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        if path.is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
        return read_sharded(path)[key]
    except distributed_checkpoint.CheckpointException as error:  # not an `Exception`
        cause = next((wrapped[0] for wrapped in error.failures.values()), error)
        raise ValueError(f"It cannot be read: {quoted(str(cause))}.") from error
    except Exception as error:  # torch reports unknown types, bad archives and bad pickles in many ways
        raise ValueError(f"It cannot be read: {quoted(str(error))}.") from error


def write_state(path: Path, key: str, state: dict[str, Any]) -> None:
    """Write a state dict for `read_state`: a file if the name has a suffix, otherwise a directory."""
    if path.suffix:
        torch.save(state, path)
        return
    writer = distributed_checkpoint.FileSystemWriter(path)
    with warnings.catch_warnings():
        for message in ("torch.distributed is disabled", "TypedStorage is deprecated"):  # intended; torch 2.9's own
            warnings.filterwarnings("ignore", message=message)
        distributed_checkpoint.save({key: state}, storage_writer=writer, no_dist=True)


@contextmanager
def plain_weights(checkpoint: Path, layout: Layout) -> Iterator[Path]:
    """A directory with `config.json` and safetensors weights: the checkpoint if it has them, else a temporary one.

    Raises:
        ValueError: if `config.json` is missing, which FSDP leaves out beside sharded weights, or FSDP's weights
            cannot be read.
    """
    if not layout.is_fsdp or has_weights(checkpoint):
        yield checkpoint
        return
    if not (checkpoint / CONFIG_FILE).is_file():
        raise ValueError(
            f"{checkpoint} has no {CONFIG_FILE}: a Trainer writes none beside sharded weights of FSDP. Copy the "
            "one of the model that the run began with into it, with the model's class in its architectures."
        )
    try:
        state = read_state(checkpoint / layout.weights, "model")
    except ValueError as error:
        raise ValueError(f"{checkpoint / layout.weights}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{checkpoint / layout.weights} does not hold a model's state: {quoted(state)}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({key: value.clone() for key, value in state.items()}, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
        config = read_json(checkpoint / CONFIG_FILE)
        classes = config.get("architectures")
        if isinstance(classes, list):
            config["architectures"] = [str(item).removeprefix(CLASS_PREFIX) for item in classes]
        write_json(folder / CONFIG_FILE, config)
        try:
            yield folder
        except ValueError as error:
            raise ValueError(str(error).replace(name, str(checkpoint))) from error
