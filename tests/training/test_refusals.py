"""Engines that cannot be cut in place are refused before the first step, with the way out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from hf_compressm.models import LRUForCausalLM
from hf_compressm.surgery import unsupported_feature
from tests.family_table import LRU
from tests.trainers import callback_of, trainer_of


@contextmanager
def torch_process_group(folder: Path) -> Iterator[None]:
    """One process that is a group of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("owner", "name", "value", "engine"),
    [
        (TrainingArguments, "n_gpu", 2, "nn.DataParallel.*accelerate launch"),
        (TrainingArguments, "world_size", 4, "4 processes without DistributedDataParallel.*hf-compressm compress"),
        (Trainer, "is_fsdp_enabled", True, "FSDP.*hf-compressm compress CHECKPOINT --output DIR"),
        (Trainer, "is_deepspeed_enabled", True, "DeepSpeed.*hf-compressm compress"),
        (LRUForCausalLM, "is_quantized", True, "quantised weights.*hf-compressm compress"),
    ],
)
def test_engines_that_cannot_be_cut_are_refused(
    owner: type, name: str, value: Any, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(LRU, tmp_path)
    vars(trainer).pop(name, None)
    monkeypatch.setattr(owner, name, property(lambda self: value), raising=False)
    with pytest.raises(ValueError, match=engine):
        callback_of(trainer).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path)
    with torch_process_group(tmp_path):
        mesh = init_device_mesh("cpu", (1,))
        layer = trainer.model.lm_head
        layer.weight = torch.nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"tensor parallelism.*hf-compressm compress"):
            callback_of(trainer).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_features_of_ddp_that_hold_on_to_parameters_are_refused(tmp_path: Path) -> None:
    with torch_process_group(tmp_path):
        assert unsupported_feature(DistributedDataParallel(torch.nn.Linear(2, 2))) == ""
        layer = torch.nn.Linear(2, 2)
        delayed = {"delay_all_reduce_named_params": [("weight", layer.weight)], "param_to_hook_all_reduce": layer.bias}
        trainer = trainer_of(LRU, tmp_path)
        trainer.model_wrapped = DistributedDataParallel(layer, **delayed)
        with pytest.raises(ValueError, match="DistributedDataParallel with delay_all_reduce_named_params"):
            callback_of(trainer).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
