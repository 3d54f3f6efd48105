"""The launch configurations are ones that accelerate reads, and the launch scripts do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))
SCRIPTS = sorted((EXAMPLES / "launch").glob("*.sh"))
SMALL = "--hidden_size 8 --state_size 16 --max_steps 8 --num_cuts 2 --end 0.5 --max_characters 6000"
SMALL += " --block_size 32 --max_eval_blocks 8 --max_new_tokens 4 --per_device_train_batch_size 2 --disable_tqdm true"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(path)
    assert config.num_processes == {"cpu": 2, "single_gpu": 1, "multi_gpu": 8, "multi_node": 16, "fsdp": 8}[path.stem]
    if path.stem == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_whole_and_may_be_run(path: Path) -> None:
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    named = [word for word in text.replace('"', " ").split() if "accelerate_configs/" in word]
    assert named
    for word in named:
        assert (EXAMPLES / "accelerate_configs" / word.rsplit("/", 1)[1].rstrip("}")).is_file()


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    repository = str(EXAMPLES.parent)
    variables = {**os.environ, "PATH": path, "PYTHONPATH": repository, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", str(EXAMPLES / "launch" / name), *SMALL.split(), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_processes_on_the_cpu(tmp_path: Path) -> None:
    process = script("cpu.sh", "--output_dir", str(tmp_path))
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("Reloaded from") == 1  # by one of the two
    assert "timed steps" in process.stdout


@pytest.mark.slow
def test_two_phases_go_on_with_a_smaller_model(tmp_path: Path) -> None:
    configuration = str(EXAMPLES / "accelerate_configs" / "cpu.yaml")  # accelerate has no FSDP on the CPU
    settings = {"CONFIG": configuration, "CUT_AT": "3", "TOLERANCE": "0.2", "RUN": str(tmp_path)}
    process = script("fsdp_two_phase.sh", "--use_cpu", "true", **settings)
    assert process.returncode == 0, process.stderr[-3000:]
    sizes = [json.loads((tmp_path / name / "config.json").read_text())["state_size"] for name in ("big", "small")]
    assert sizes[0] == 16 > sizes[1]
    state = json.loads((tmp_path / "small" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry][-1] == 8
