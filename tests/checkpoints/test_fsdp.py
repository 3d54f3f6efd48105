"""FSDP in two phases: train, cut the checkpoint on disk, resume with the smaller model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_compressm import CompreSSMConfig, compress_checkpoint, verify_checkpoint
from hf_compressm.checkpoints import read_saved
from hf_compressm.checkpoints.fsdp import FULL, SHARDED, read_state, write_state
from hf_compressm.checkpoints.optimizer_state import restore_saved
from tests.family_table import LRU, MAMBA, Family, family_id, same
from tests.fsdp_run import BLOCKS, RUN
from tests.trainers import callback_of, trainer_of


ROOT = Path(__file__).parents[2]
CUT = 3
SETTINGS = {"fraction": 0.5, "end": CUT, "num_cuts": 1}
BEST = {"tolerance": 0.05, "per_layer": True, "compat": "best", "min_reduction": 0}
KINDS = {"FULL_STATE_DICT": FULL, "SHARDED_STATE_DICT": SHARDED}


def as_fsdp_writes(plain: Path, folder: Path, kind: str) -> Path:
    """A plain checkpoint in the files of FSDP."""
    kept = ["config.json", "trainer_state.json", "scheduler.pt", "rng_state.pth"]
    folder.mkdir()
    for name in [*kept, "model.safetensors"] if kind == "FULL_STATE_DICT" else kept:
        shutil.copy(plain / name, folder)
    model = read_saved(plain).load()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = restore_saved(torch.load(plain / "optimizer.pt", weights_only=True), model)
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    state = {"state": {names[id(p)]: value for p, value in optimizer.state.items()}, "param_groups": groups}
    write_state(folder / KINDS[kind][0], "model", model.state_dict())
    write_state(folder / KINDS[kind][1], "optimizer", state)
    return folder


def moments_by_name(folder: Path) -> dict[str, Any]:
    """Moments of a plain checkpoint by the name of their parameter."""
    model = read_saved(folder).load()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = restore_saved(torch.load(folder / "optimizer.pt", weights_only=True), model)
    return {names[id(parameter)]: state for parameter, state in optimizer.state.items()}


@pytest.fixture(scope="module", params=[LRU, MAMBA], ids=family_id)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    folder = tmp_path_factory.mktemp("plain")
    trainer_of(request.param, folder, None, **{**RUN, "max_steps": CUT}).train()
    return request.param, folder / f"checkpoint-{CUT}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"fraction": 0.5}, {"fraction": 0.5, "optimizer_state": "reset"}, BEST])
def test_the_files_of_fsdp_are_cut_as_plain_ones(
    settings: dict, kind: str, plain: tuple[Family, Path], tmp_path: Path
) -> None:
    family, checkpoint = plain
    config, calibration = CompreSSMConfig.from_dict(settings), family.calibration()
    before = as_fsdp_writes(checkpoint, tmp_path / "before", kind)
    compress_checkpoint(checkpoint, tmp_path / "plain", config, calibration)
    compress_checkpoint(before, tmp_path / "fsdp", config, calibration)
    verify_checkpoint(tmp_path / "fsdp")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    found = read_state(tmp_path / "fsdp" / KINDS[kind][0], "model")
    assert same({name: found[name] for name in weights}, weights)
    assert same(load_file(tmp_path / "fsdp" / "model.safetensors"), weights)
    optimizer, moments = (
        read_state(tmp_path / "fsdp" / KINDS[kind][1], "optimizer"),
        moments_by_name(tmp_path / "plain"),
    )
    model = read_saved(tmp_path / "fsdp").load()
    assert set(optimizer["state"]) == {name for name, _ in model.named_parameters()}  # FSDP loads no state with gaps
    assert same({name: optimizer["state"][name] for name in moments}, moments)
    for name, parameter in model.named_parameters():
        assert optimizer["state"][name]["exp_avg"].shape == parameter.shape
        assert name in moments or not optimizer["state"][name]["exp_avg"].any()


def test_what_fsdp_leaves_out_or_splits_is_refused(plain: tuple[Family, Path], tmp_path: Path) -> None:
    before = as_fsdp_writes(plain[1], tmp_path / "before", "SHARDED_STATE_DICT")
    (before / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"no config.json.*Copy"):
        compress_checkpoint(before, tmp_path / "out", CompreSSMConfig(fraction=0.5), plain[0].calibration())
    other = json.loads((tmp_path / "config.json").read_text()) | {"state_size": 5}
    (before / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=rf"{before}.*config.json is at odds with the weights"):
        compress_checkpoint(before, tmp_path / "out", CompreSSMConfig(fraction=0.5), plain[0].calibration())
    (tmp_path / "config.json").rename(before / "config.json")
    (before / SHARDED[0] / ".metadata").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"pytorch_model_fsdp_0: It cannot be read"):
        compress_checkpoint(before, tmp_path / "out", CompreSSMConfig(fraction=0.5), plain[0].calibration())
    (before / "optimizer_0_rank0.bin").touch()
    with pytest.raises(ValueError, match=r"one process.*FULL_STATE_DICT"):
        compress_checkpoint(before, tmp_path / "out", CompreSSMConfig(fraction=0.5))
    assert not (tmp_path / "out").exists()


def launch(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "fsdp_run.py"), str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lru", "mamba"])
def test_two_processes_of_fsdp2_go_on_as_a_run_that_was_cut_in_place(name: str, kind: str, tmp_path: Path) -> None:
    family = BLOCKS[name][0]
    torch.manual_seed(0)
    whole = trainer_of(
        family, tmp_path / "whole", SETTINGS, **RUN, gradient_accumulation_steps=2, calibration=family.calibration()
    )
    whole.train()
    assert [event.outcome for event in callback_of(whole).events] == ["cut"]
    losses = {entry["step"]: entry["loss"] for entry in whole.state.log_history if "loss" in entry}

    launch(tmp_path / "before", name, kind)
    config = CompreSSMConfig.from_dict(SETTINGS)
    checkpoint = tmp_path / "before" / f"checkpoint-{CUT}"
    if kind == "SHARDED_STATE_DICT":
        family.build().save_pretrained(tmp_path / "original")
        shutil.copy(tmp_path / "original" / "config.json", checkpoint)
    compress_checkpoint(checkpoint, tmp_path / "cut", config, family.calibration())
    launch(tmp_path / "after", name, kind, str(tmp_path / "cut"))

    after = {int(step): loss for step, loss in json.loads((tmp_path / "after" / "losses.json").read_text()).items()}
    assert after[CUT + 1] == pytest.approx(losses[CUT + 1], abs=1e-5)
    assert after == pytest.approx(losses, abs=1e-4)
    weights = torch.load(tmp_path / "after" / "weights.pt", weights_only=True)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=1e-4)
