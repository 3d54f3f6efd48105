"""The base of a PEFT model is written once per cut, and hardly read afterwards."""

import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_compressm.checkpoints import read_saved, seal_checkpoint, unseal_checkpoint
from hf_compressm.files import atomic
from hf_compressm.peft import saved_base
from hf_compressm.utils import processes
from tests.family_table import MAMBA
from tests.peft.test_wrapped_runs import cut, run


class Counting:
    """Counts the bytes that go through CRC-32."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, data: Any, value: int = 0) -> int:
        self.bytes += memoryview(data).nbytes
        return zlib.crc32(data, value)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    for module in (atomic, saved_base, processes):
        monkeypatch.setattr(module, "zlib", SimpleNamespace(crc32=counting))
    return counting


def large(**sizes: int) -> Any:
    """A model whose base is much larger than its adapters and its configuration."""
    return get_peft_model(MAMBA.build(vocab_size=4001, hidden_size=32, **sizes), LoraConfig(target_modules=["x_proj"]))


def weights_of(folder: Path) -> Path:
    return folder / "base_model/model.safetensors"


def test_a_run_writes_a_base_once_per_cut_and_its_checkpoints_hold_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    save = transformers.modeling_utils.safe_save_file

    def noted(tensors: Any, name: str, **kwargs: Any) -> None:
        written.append(Path(name))
        save(tensors, name, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", noted)
    run(tmp_path, model=large(), max_steps=7)
    assert len([path for path in written if "base_model" in str(path)]) == 2  # before the cut, and after it
    inodes = [weights_of(tmp_path / f"checkpoint-{step}").stat().st_ino for step in range(1, 8)]
    assert len(set(inodes)) == 2
    assert all(read_saved(tmp_path / f"checkpoint-{step}").is_sealed for step in range(1, 8))


def test_a_second_save_reads_hardly_anything(counting: Counting, tmp_path: Path) -> None:
    model = large()
    cut(model.eval(), MAMBA)
    folders = [tmp_path / name for name in ("checkpoint-1", "checkpoint-2")]
    counts = []
    for folder in folders:
        counting.bytes = 0
        model.save_pretrained(folder)  # as a Trainer does
        saved_base.save_base(model, folder)  # as the callback does
        seal_checkpoint(folder)
        counts.append(counting.bytes)
    size = weights_of(folders[0]).stat().st_size
    assert counts[0] > size > 10 * counts[1]
    assert weights_of(folders[0]).samefile(weights_of(folders[1]))
    assert all(read_saved(folder).is_sealed for folder in folders)
    damaged = bytearray(weights_of(folders[1]).read_bytes())
    damaged[-1] ^= 1
    weights_of(folders[1]).write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        read_saved(folders[1])


@pytest.mark.parametrize("later", ["checkpoint-1", "checkpoint-2"])
def test_a_base_whose_checkpoint_is_overwritten_is_written_again(later: str, tmp_path: Path) -> None:
    model = large()
    cut(model.eval(), MAMBA)
    model.save_pretrained(tmp_path / "checkpoint-1")
    seal_checkpoint(tmp_path / "checkpoint-1")
    unseal_checkpoint(tmp_path / "checkpoint-1")  # as before every save of a Trainer
    model.save_pretrained(tmp_path / later)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / later / "base_model")
    assert torch.equal(saved.get_input_embeddings().weight, model.get_input_embeddings().weight)


def written_into(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0, 0] += 1


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(1.5)


def replaced_data(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


def trained_by_a_fused_optimizer(weight: nn.Parameter) -> None:
    weight.requires_grad_(True)
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 1] = 1.0  # an entry that no sample shows
    torch.optim.AdamW([weight], fused=True, weight_decay=0.0).step()


@pytest.mark.parametrize("change", [written_into, through_data, replaced_data, trained_by_a_fused_optimizer])
def test_a_base_that_has_changed_is_written_again(change: Callable[[nn.Parameter], None], tmp_path: Path) -> None:
    model = large()
    cut(model.eval(), MAMBA)
    model.save_pretrained(tmp_path / "one")
    name, weight = next(item for item in model.named_parameters() if "embed" in item[0])
    assert not weight.requires_grad
    change(weight)
    model.save_pretrained(tmp_path / "two")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two/base_model")
    assert torch.equal(saved.get_input_embeddings().weight, weight), name
    assert not weights_of(tmp_path / "one").samefile(weights_of(tmp_path / "two"))
