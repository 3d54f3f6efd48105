"""A directory of torch.distributed.checkpoint is read whole, and nothing that a stranger put into it is run."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compressm.checkpoints.fsdp import read_state, write_state
from tests.family_table import same


class Trap:
    """Makes a file when it is unpickled by whoever trusts it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_what_was_written_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4).to(dtype), "y": torch.ones(1, dtype=dtype)}
    state = {"state": {"x": tensors}, "param_groups": [{"params": ["x", "y"], "lr": 0.1, "betas": (0.9, 0.99)}]}
    write_state(tmp_path / "optimizer_0", "optimizer", state)
    found = read_state(tmp_path / "optimizer_0", "optimizer")
    assert same(found["state"]["x"], tensors)
    assert found["param_groups"][0]["lr"] == 0.1
    assert found["param_groups"][0]["params"] == ["x", "y"]


@pytest.mark.parametrize("place", ["metadata", "value", "file"])
def test_nothing_that_a_stranger_put_there_is_run(place: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap, path = Trap(sprung), tmp_path / ("optimizer.bin" if place == "file" else "optimizer_0")
    state = {"state": {}, "param_groups": [{"params": ["x"], "lr": 0.1 if place == "metadata" else trap}]}
    write_state(path, "optimizer", state)
    if place == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(path, "optimizer")
    assert not sprung.exists()


def test_files_outside_the_directory_are_not_read(tmp_path: Path) -> None:
    write_state(tmp_path / "optimizer_0", "optimizer", {"x": torch.ones(2)})
    metadata = pickle.loads((tmp_path / "optimizer_0" / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        object.__setattr__(info, "relative_path", "../outside")
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not a file in it"):
        read_state(tmp_path / "optimizer_0", "optimizer")
