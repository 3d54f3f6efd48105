"""Card, driver and versions: figures of others are not taken for those of this machine."""

import importlib.metadata
import shutil
import subprocess

import torch
from measuring import cpu_name


PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d", "hf_compressm")


def hardware(device: str) -> dict[str, str]:
    """Name by kind; a package that is not installed says so."""
    is_gpu = device == "cuda"
    found = {
        "card": torch.cuda.get_device_name() if is_gpu else f"no GPU, {cpu_name()}",
        "driver": _driver() if is_gpu else "none",
    }
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    """As installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Of the first card, as far as its tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"
