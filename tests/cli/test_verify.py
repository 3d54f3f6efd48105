"""`hf-compressm verify` on whole and on broken checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compressm import CompreSSMConfig, compress, compress_checkpoint
from hf_compressm.files.names import SEAL
from tests.cli.running import complaint, run
from tests.family_table import (
    LRU,
    MAMBA,
    STATE_SIZE,
    Family,
    each,
    family_id,
)
from tests.own_modules import llava, own_layers
from tests.trainers import trainer_of


@pytest.mark.parametrize("family", each(), ids=family_id)
def test_every_family_is_whole_as_it_was_saved(family: Family, tmp_path: Path, capsys: Any) -> None:
    model = family.build()
    model.save_pretrained(tmp_path)
    code, out, _ = run(capsys, "verify", tmp_path, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["checkpoint"] == str(tmp_path)
    assert not found["sealed"]
    assert found["model"] == type(model).__name__
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert set(found["state_sizes"].values()) == {STATE_SIZE}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Sealed, after a cut."""
    trainer_of(LRU, tmp_path, save_strategy="steps", save_steps=6).train()
    return tmp_path / "checkpoint-6"


def test_a_checkpoint_says_its_step(checkpoint: Path, capsys: Any) -> None:
    assert (checkpoint / SEAL).exists()
    code, out, err = run(capsys, "verify", checkpoint)
    assert code == 0
    assert f"{checkpoint} is whole: LRUForCausalLM" in out
    assert f"SSM layers of {STATE_SIZE // 2} states, step 6, sealed." in out
    assert "error" not in err
    assert run(capsys, "verify", checkpoint, "--quiet")[:2] == (0, "")


def test_weights_of_a_module_without_a_configuration_are_counted(tmp_path: Path, capsys: Any) -> None:
    model = own_layers()
    for name in ("checkpoint-4", "elsewhere"):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors", {"format": "pt"})
    assert "has neither config.json nor adapter_config.json" in complaint(capsys, "verify", tmp_path / "elsewhere")
    code, out, _ = run(capsys, "verify", tmp_path / "checkpoint-4")  # from which training can resume
    assert code == 0
    assert f"{len(model.state_dict())} tensors of a model without a configuration" in out


def test_a_composite_model_is_verified_as_a_whole(tmp_path: Path, capsys: Any) -> None:
    model = llava()
    compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    model.save_pretrained(tmp_path)
    code, out, _ = run(capsys, "verify", tmp_path, "--json")
    assert code == 0
    assert set(json.loads(out)["state_sizes"].values()) == {4}
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["mamba_d_state"] = 6
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "at odds with the weights" in complaint(capsys, "verify", tmp_path)
    values["text_config"]["mamba_d_state"] = "six"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "text_config.mamba_d_state must be a whole number" in complaint(capsys, "verify", tmp_path)


def test_a_composite_model_is_cut_on_the_command_line_like_any_other(tmp_path: Path, capsys: Any) -> None:
    llava().save_pretrained(tmp_path / "model")
    command = ("compress", tmp_path / "model", "--output", tmp_path / "smaller", "--fraction", 0.5)
    assert "measured on data: give --train-file" in complaint(capsys, *command)
    compress_checkpoint(tmp_path / "model", tmp_path / "smaller", CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    code, out, _ = run(capsys, "verify", tmp_path / "smaller")
    assert code == 0
    assert "2 SSM layers of 4 states" in out


def change(path: Path, value: float) -> str:
    """Put a value into the first tensor of a file of weights; returns the tensor's name."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def test_what_is_broken_is_named(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    change(weights, 3.0)
    assert f"{weights} is damaged" in complaint(capsys, "verify", checkpoint)
    (checkpoint / SEAL).unlink()
    assert run(capsys, "verify", checkpoint)[0] == 0  # without a seal nothing tells what was written
    for value in (float("nan"), float("inf")):
        name = change(weights, value)
        assert f"tensor {name} holds NaN or infinity" in complaint(capsys, "verify", checkpoint)
    weights.write_bytes(whole[:-7])
    assert "not a whole safetensors file" in complaint(capsys, "verify", checkpoint)
    weights.write_bytes(whole)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "state_size": STATE_SIZE}))
    assert "config.json" in complaint(capsys, "verify", checkpoint)
    weights.unlink()
    assert "has no weights" in complaint(capsys, "verify", checkpoint)
    assert "neither a directory nor an id" in complaint(capsys, "verify", tmp_path / "checkpoint-9")
    assert "Missing argument" in complaint(capsys, "verify", "--json")


def test_the_folder_of_a_run_names_its_checkpoint(checkpoint: Path, capsys: Any) -> None:
    folder = checkpoint.parent
    for command in ("verify", "analyze"):
        line = complaint(capsys, command, folder)
        assert line.endswith(f"{folder} has no model itself. The last complete checkpoint in it is {checkpoint}.")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories in which something is missing, made of a run and its model."""
    root = tmp_path_factory.mktemp("places")
    trainer = trainer_of(LRU, root / "run", save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(root / "model"))
    shutil.copytree(root / "run", root / "broken")
    (root / "broken" / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    for name, missing in {"no config": "config.json", "no weights": "model.safetensors"}.items():
        shutil.copytree(root / "model", root / name)
        (root / name / missing).unlink()
    (root / "empty").mkdir()
    for name in ("adapters", "adapters without their config"):
        (root / name).mkdir()
        save_file({"a.lora_A.weight": torch.zeros(1, 2)}, root / name / "adapter_model.safetensors")
    (root / "adapters" / "adapter_config.json").write_text("{}")
    shutil.copytree(root / "adapters", root / "run of adapters" / "checkpoint-6")
    (root / "run of adapters" / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6}')
    shutil.copytree(root / "run of adapters", root / "adapters beside checkpoints")
    for path in (root / "adapters").iterdir():
        shutil.copy(path, root / "adapters beside checkpoints")
    broken = root / "adapters beside checkpoints" / "_before-cut-checkpoint-3"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"x")
    return root


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("run", "{} has no model itself. The last complete checkpoint in it is {}/checkpoint-6."),
        ("broken", "{} has no model itself, and no checkpoint in it is complete."),
        (
            "no config",
            "{} has neither config.json nor adapter_config.json: give a directory that save_pretrained or a ",
        ),
        ("no weights", "{} has no weights: "),
        ("empty", "{} has no weights: "),
        ("adapters without their config", "{} has neither config.json nor adapter_config.json: "),
        ("run of adapters", "{} has no model itself. The last complete checkpoint in it is {}/checkpoint-6."),
        ("model", None),
        ("adapters", None),
        ("adapters beside checkpoints", None),
    ],
)
def test_verify_and_push_agree_on_what_is_there(name: str, reason: str | None, places: Path, capsys: Any) -> None:
    if reason is None:
        assert run(capsys, "verify", places / name, "--quiet")[0] == 0
        code, out, _ = run(capsys, "push", places / name, "me/model", "--dry-run", "--json")
        assert code == 0
        assert not any("checkpoint" in file["name"] for file in json.loads(out)["files"])
    else:
        lines = [
            complaint(capsys, "verify", places / name),
            complaint(capsys, "push", places / name, "me/model", "--dry-run"),
        ]
        assert lines[0] == lines[1]
        assert lines[0].startswith(f"error: {reason.replace('{}', str(places / name))}")


def test_adapters_are_verified_with_their_base_or_without(tmp_path: Path, capsys: Any) -> None:
    peft = pytest.importorskip("peft")
    model = LRU.build()
    kind = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[kind.split(".")[-1]], r=2))
    adapted.save_pretrained(tmp_path / "adapters")
    code, out, _ = run(capsys, "verify", tmp_path / "adapters")
    assert code == 0
    assert "adapters, without the model" in out
    LRU.build().save_pretrained(tmp_path / "adapters" / "base_model")
    found = json.loads(run(capsys, "verify", tmp_path / "adapters", "--json")[1])
    assert found["model"] == "LRUForCausalLM"
