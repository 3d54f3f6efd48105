"""`hf-compressm compress` as a user would try it, with the mistakes that come first."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm.models import LRUConfig, LRUForSequenceClassification
from hf_compressm.scans import disable_fast_selective_scan, dispatchers
from tests.cli.running import complaint, run
from tests.family_table import LRU, MAMBA, MAMBA2
from tests.trainers import trainer_of


TEXT = "def compress(model):\n    return smaller(model)\n" * 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Mamba of bytes, saved."""
    folder = tmp_path / "model"
    MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=8, state_size=16, num_hidden_layers=2)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_model_becomes_smaller_and_loads(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "small"
    code, out, _ = run(capsys, "compress", model, "--output", output, "--fraction", 0.5, "--train-file", text)
    assert code == 0
    assert "16 -> 8" in out
    assert str(output) in out.replace("\n", "")
    assert AutoModelForCausalLM.from_pretrained(output).config.state_size == 8
    assert AutoModelForCausalLM.from_pretrained(model).config.state_size == 16


def test_json_is_for_programs(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ("compress", model, "--output", tmp_path / "small", "--target-state-size", 4, "--block-size", 64)
    code, out, _ = run(capsys, *arguments, "--train-file", text, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["changed"]
    assert set(result["state_sizes_after"].values()) == {4}
    assert len(result["layers"]) == 2


def test_options_win_over_a_file(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "cuts.yaml").write_text("tolerance: 0.2\nround_to: 4\ncalibration_batches: 1\n")
    arguments = ("--config", tmp_path / "cuts.yaml", "--fraction", 0.3, "--train-file", text)
    assert run(capsys, "compress", model, "--output", tmp_path / "small", *arguments, "--quiet")[:2] == (0, "")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.state_size == 12  # 11.2, in fours


def test_allowed_sizes_come_from_a_file_or_an_option(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "cuts.yaml").write_text("fraction: 0.3\nsizes: [14, 8]\ncalibration_batches: 1\n")
    arguments = ("--config", tmp_path / "cuts.yaml", "--train-file", text, "--quiet")
    for output, given, size in (("file", (), 14), ("option", ("--sizes", "8,13"), 13)):
        assert run(capsys, "compress", model, "--output", tmp_path / output, *arguments, *given)[:2] == (0, "")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / output).config.state_size == size


def test_bytes_of_the_standard_library_stand_in(model: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ("--fraction", 0.5, "--max-characters", 20_000, "--block-size", 64, "--calibration-batches", 1)
    assert run(capsys, "compress", model, "--output", tmp_path / "small", *arguments)[0] == 0


def test_a_checkpoint_keeps_its_optimizer(tmp_path: Path, capsys: Any) -> None:
    trainer_of(LRU, tmp_path / "run", None, save_strategy="steps", save_steps=3).train()
    output = tmp_path / "cut" / "checkpoint-3"
    assert run(capsys, "compress", tmp_path / "run" / "checkpoint-3", "--output", output, "--fraction", 0.5)[0] == 0
    trainer = trainer_of(LRU, tmp_path / "cut", None, model=AutoModelForCausalLM.from_pretrained(output))
    trainer.train(resume_from_checkpoint=str(output))
    assert trainer.state.global_step == 6
    assert all(state["step"] == 6 for state in trainer.optimizer.state_dict()["state"].values())


def test_sequences_of_numbers(tmp_path: Path, capsys: Any) -> None:
    config = LRUConfig(input_size=1, hidden_size=6, state_size=16, num_hidden_layers=1, num_labels=10)
    LRUForSequenceClassification(config).save_pretrained(tmp_path / "model")
    for name, count in (("train", 12), ("t10k", 4)):
        header = b"\0\0\x08\x03" + np.array([count, 5, 5], ">u4").tobytes()
        pixels = np.random.default_rng(0).integers(0, 256, count * 25, np.uint8).tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = b"\0\0\x08\x01" + np.array([count], ">u4").tobytes() + bytes(count)
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    arguments = ("compress", tmp_path / "model", "--output", tmp_path / "small", "--fraction", 0.5, "--json")
    _, out, _ = run(capsys, *arguments, "--criterion", "empirical", "--mnist-dir", tmp_path)
    assert set(json.loads(out)["state_sizes_after"].values()) == {8}
    other = ("compress", tmp_path / "model", "--output", tmp_path / "other")
    assert "use --mnist-dir" in complaint(capsys, *other, "--train-file", tmp_path / "x")


def test_mistakes_are_one_line(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    output = ("--output", tmp_path / "small")
    data = ("--train-file", text)
    assert "No such option: --outptu" in complaint(capsys, "compress", model, "--outptu", "x")
    assert "Missing option" in complaint(capsys, "compress", model)
    assert "neither a directory nor an id" in complaint(capsys, "compress", tmp_path / "nothing", *output)
    assert "nobody/nothing" in complaint(capsys, "compress", "nobody/nothing", *output)
    assert "tolerance must lie in" in complaint(capsys, "compress", model, *output, "--tolerance", 1.5)
    assert "There is no file nowhere.txt" in complaint(
        capsys, "compress", model, *output, "--train-file", "nowhere.txt"
    )
    assert "give no example" in complaint(capsys, "compress", model, *output, *data, "--block-size", 10**6)
    assert "use --train-file" in complaint(capsys, "compress", model, *output, "--mnist-dir", tmp_path)
    assert "cuts.toml" in complaint(capsys, "compress", model, *output, "--config", tmp_path / "cuts.toml")
    assert "exists and is not empty" in complaint(capsys, "compress", model, "--output", model.parent, *data)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_files_that_are_not_text_are_named(command: str, model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    words = [command, model, *(["--output", tmp_path / "small"] if command == "compress" else [])]
    weights = model / "model.safetensors"
    line = complaint(capsys, *words, "--train-file", text, "--train-file", weights)
    assert f"{weights} is not text in UTF-8: byte " in line
    assert "Give a text file, or convert" in line
    (tmp_path / "cuts.yaml").write_text("fraction: 0.5", encoding="utf-16")
    line = complaint(capsys, *words, "--train-file", text, "--config", tmp_path / "cuts.yaml")
    assert f"{tmp_path / 'cuts.yaml'} is not text in UTF-8: byte 0 is 0xff (it looks like UTF-16)" in line
    assert not (tmp_path / "small").exists()


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was begun: downloading or finding the model, and reading it."""
    begun: list[str] = []
    for name in ("local_directory", "calibration_batches"):
        monkeypatch.setattr(f"hf_compressm.cli.inputs.{name}", lambda *args, name=name: begun.append(name))
    return begun


def test_an_output_that_cannot_be_written_is_found_before_any_work(
    model: Path, at_work: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    for output, reason in {
        model.parent: "exists and is not empty",
        tmp_path / "file": "exists and is not empty",
        tmp_path / "file" / "small": "Not a directory",
        model / "small": "or inside it",
        "/proc/small": "cannot be written",
        tmp_path / ("long" * 100): "File name too long",
    }.items():
        assert reason in complaint(capsys, "compress", model, "--output", output), output
    assert "no_such.yaml" in complaint(
        capsys, "compress", model, "--output", tmp_path / "small", "--config", tmp_path / "no_such.yaml"
    )
    assert at_work == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


@pytest.mark.parametrize(("kind", "scan"), [("mamba", "selective_scan"), ("mamba2", "ssd_scan")])
@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_models_run_on_the_fast_scan(
    kind: str, scan: str, command: str, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_fast_selective_scan()
    calls, real = [], getattr(dispatchers, scan)
    monkeypatch.setattr(dispatchers, scan, lambda *args, **kwargs: calls.append(scan) or real(*args, **kwargs))
    family = {"mamba": MAMBA, "mamba2": MAMBA2}[kind]
    family.build(vocab_size=256).save_pretrained(tmp_path / "model")
    words = [command, tmp_path / "model"]
    words += ["--output", tmp_path / "small", "--refit-steps", 0] if command == "compress" else []
    data = ("--train-file", text, "--block-size", 32, "--calibration-batches", 2)
    assert run(capsys, *words, *data, "--quiet")[0] == 0
    assert len(calls) == 4  # two layers, two batches


def test_a_mamba_without_data_says_what_it_needs(tmp_path: Path, capsys: Any) -> None:
    MAMBA.build(dtype=torch.float32).save_pretrained(tmp_path / "model")
    assert "--train-file" in complaint(capsys, "compress", tmp_path / "model", "--output", tmp_path / "small")


def test_the_command_is_installed_and_helps(tmp_path: Path) -> None:
    code = "import sys; from hf_compressm.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "dumb"}
    process = subprocess.run(
        [sys.executable, "-c", code, "compress", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert max(map(len, process.stdout.splitlines())) <= 80
    for option in ("--output", "--tolerance", "--per-layer", "--train-file", "--mnist-dir", "--json"):
        assert option in process.stdout
