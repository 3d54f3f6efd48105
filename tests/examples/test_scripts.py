"""Both example scripts, small: every way to give data, model and settings, and a user's mistakes."""

import gzip
import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoConfig


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))
CLM_CONFIGS = ("clm.yaml", "mamba_130m.yaml")

SMALL = {"hidden_size": 8, "state_size": 16, "num_hidden_layers": 2, "max_steps": 8, "num_cuts": 2, "end": 0.5}
SMALL |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "tolerance": 0.2}
CLASSIFY = SMALL | {"max_train_samples": 64, "max_eval_samples": 32}
CLM = SMALL | {"max_characters": 6000, "block_size": 32, "max_eval_blocks": 8, "max_new_tokens": 4}


@pytest.fixture
def script(monkeypatch):
    """Imports a script as Python does that runs it: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def flags(settings: dict) -> list[str]:
    found = []
    for name, value in settings.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def check_run(folder: Path, printed: str) -> None:
    """The record tells of a cut, report and card are there, and the model was used after it had been saved."""
    config = json.loads((folder / "config.json").read_text())
    record = config["compressm"]
    assert sum(record["state_sizes_after"].values()) < sum(record["state_sizes_before"].values())
    for name in ("report.html", "compressm_figures/spectra.png"):
        assert (folder / name).stat().st_size > 0
    assert "## Compression" in (folder / "README.md").read_text()
    for line in (
        "loss before",
        "training tokens per second",
        "Peak memory",
        "report.html",
        f"Reloaded from {folder}",
        "Next:",
    ):
        assert line in printed


def write_idx(path: Path, values: np.ndarray, compressed: bool) -> None:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if compressed else content)


def write_mnist(folder: Path, compressed: bool = False) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    suffix = ".gz" if compressed else ""
    for name, count in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images, compressed)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10, compressed)
    return folder


def test_digits_then_a_local_directory(script, tmp_path, capsys):
    main = script("run_sequence_classification").main
    metrics = main(flags(CLASSIFY | {"output_dir": tmp_path / "first"}))
    check_run(tmp_path / "first", capsys.readouterr().out)
    assert 0 <= metrics["accuracy"] <= 1
    again = CLASSIFY | {"output_dir": tmp_path / "second", "model_name_or_path": tmp_path / "first"}
    main(flags(again))
    check_run(tmp_path / "second", capsys.readouterr().out)


def test_mnist_from_idx_files_with_an_lru(script, tmp_path, capsys):
    folder = write_mnist(tmp_path / "mnist", compressed=True)
    settings = CLASSIFY | {"output_dir": tmp_path / "run", "mnist_dir": folder, "model_type": "lru"}
    settings["config_overrides"] = "activation=full_glu,initializer_range=0.2"
    script("run_sequence_classification").main(flags(settings))
    check_run(tmp_path / "run", capsys.readouterr().out)
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert (config.activation, config.initializer_range) == ("full_glu", 0.2)


def test_images_with_channels_become_frames(script):
    to_sequences = script("run_sequence_classification").to_sequences
    images = np.full((5, 2, 3, 4), 255, dtype=np.uint8)
    sequences = to_sequences(list(images))
    assert sequences.shape == (5, 6, 4)
    assert sequences.max() == 1


@pytest.mark.slow
def test_standard_library_then_a_local_directory_and_text(script, tmp_path, capsys):
    main = script("run_clm").main
    main(flags(CLM | {"output_dir": tmp_path / "first"}))
    check_run(tmp_path / "first", capsys.readouterr().out)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    again = {"output_dir": tmp_path / "second", "model_name_or_path": tmp_path / "first", "train_file": [text, text]}
    main(flags(CLM | again))
    check_run(tmp_path / "second", capsys.readouterr().out)


@pytest.mark.slow
def test_a_script_runs_from_a_yaml_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CLASSIFY | {"output_dir": str(tmp_path / "run")}))
    command = [sys.executable, EXAMPLES / "run_sequence_classification.py", config]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=EXAMPLES.parent, env=package_path()
    )
    assert done.returncode == 0, done.stderr
    check_run(tmp_path / "run", done.stdout)


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, EXAMPLES / "run_clm.py", tmp_path / "missing.yaml"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=EXAMPLES.parent, env=package_path()
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: There is no file {tmp_path / 'missing.yaml'}."


def package_path() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_file_is_read(script, path, tmp_path):
    name = "run_clm" if path.name in CLM_CONFIGS else "run_sequence_classification"
    module = script(name)
    training = module.ClmTrainingArguments if name == "run_clm" else module.DigitsTrainingArguments
    kinds = (module.ModelArguments, module.DataArguments, module.CompreSSMConfig, training)
    values = yaml.safe_load(path.read_text())
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(values | {"seed": 7, "use_cpu": True}))
    parsed = script("shared").parse_arguments(kinds, [str(copy)])
    assert [parsed[2].sampling_seed, parsed[3].seed] == [0, 7]
    assert parsed[2].tolerance == values["tolerance"]
    assert parsed[3].output_dir == values["output_dir"]


@pytest.mark.parametrize("name", ["clm.yaml", "digits.yaml"])
def test_the_config_file_of_a_default_run_is_the_default(script, name):
    module = script("run_clm" if name == "clm.yaml" else "run_sequence_classification")
    training = module.ClmTrainingArguments if name == "clm.yaml" else module.DigitsTrainingArguments
    kinds = (module.ModelArguments, module.DataArguments, module.CompreSSMConfig, training)
    parse = script("shared").parse_arguments
    from_file = parse(kinds, [str(EXAMPLES / "configs" / name)])
    from_defaults = parse(kinds, ["--seed", str(from_file[3].seed)])
    assert from_file[:2] == from_defaults[:2]
    assert from_file[3].to_dict() == from_defaults[3].to_dict()
    file_settings, default_settings = (parsed[2].to_dict() for parsed in (from_file, from_defaults))
    assert file_settings == default_settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tolerence: 0.1\n", "tolerence"),
        ("- a\n- b\n", "list"),
        ("a: [\n", "not valid YAML"),
        ("tolerance: 2\n", "tolerance must lie in"),
    ],
)
def test_a_wrong_config_file_is_refused(script, content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        script("run_sequence_classification").main([str(path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_file": ["missing.txt"]}, "no file missing.txt"),
        ({"train_file": ["a"], "dataset_name": "b"}, "not both"),
        ({"max_characters": 50}, "has 50 tokens"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"tolerance": None, "target_state_size": 32}, "target_state_size=32"),
        ({"model_name_or_path": "missing/directory"}, "nor a model that can be loaded from the Hub"),
        ({"dataset_name": "missing/data"}, "cannot be loaded"),
        ({"end": 0.01}, "No cut can happen"),
    ],
)
def test_a_mistake_in_language_modelling_is_a_value_error(script, settings, message, tmp_path):
    settings = {k: v for k, v in (CLM | {"output_dir": tmp_path / "run"} | settings).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        script("run_clm").main(flags(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mnist_dir": "missing"}, "neither missing"),
        ({"mnist_dir": "a", "dataset_name": "b"}, "not both"),
        ({"dataset_name": "missing/data"}, "cannot be loaded"),
        ({"test_size": 1.5}, "test_size must lie between"),
        ({"model_name_or_path": "missing/directory"}, "nor a model that can be loaded from the Hub"),
        ({"state_size": 15}, "conjugate pairs"),
        ({"config_overrides": "activation"}, "config_overrides must be fields of the config"),
        ({"config_overrides": "width=3"}, "key width isn't in"),
        ({"config_overrides": "activation=none"}, "`activation` is .none.; choose one of"),
        ({"tolerance": None, "target_state_size": 32}, "target_state_size=32"),
    ],
)
def test_a_mistake_in_classification_is_a_value_error(script, settings, message, tmp_path):
    settings = {k: v for k, v in (CLASSIFY | {"output_dir": tmp_path / "run"} | settings).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        script("run_sequence_classification").main(flags(settings))


def test_a_broken_idx_file_is_refused(script, tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    images = folder / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut short"):
        script("run_sequence_classification").main(flags(CLASSIFY | {"mnist_dir": folder}))
