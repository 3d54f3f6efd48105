"""The Triton kernels: their laws in Triton's interpreter and on a GPU, each file of them in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("laws", ["boundary_laws.py", "selective_laws.py"])
@pytest.mark.parametrize(
    ("device", "interpreted"),
    [
        pytest.param("cpu", "1", id="interpreter", marks=pytest.mark.slow),
        pytest.param("cuda", "0", id="gpu", marks=NO_GPU),
    ],
)
def test_laws(device, interpreted, laws, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(laws))]
    environment = {
        **os.environ,
        "KERNEL_DEVICE": device,
        "TRITON_INTERPRET": interpreted,
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
