"""The Triton kernels: their laws in Triton's interpreter and on a GPU, and what the compiler makes of them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
LAWS = Path(__file__).with_name("boundary_laws.py")


@pytest.mark.parametrize(
    ("device", "interpreted"),
    [
        pytest.param("cpu", "1", id="interpreter", marks=pytest.mark.slow),
        pytest.param(
            "cuda", "0", id="gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
        ),
    ],
)
def test_laws(device, interpreted, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(LAWS)]
    environment = {
        **os.environ,
        "KERNEL_DEVICE": device,
        "TRITON_INTERPRET": interpreted,
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("name", ["_states_kernel", "_adjoint_kernel"])
def test_compiles_to_paired_accesses_without_shared_memory(name, dtype, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does, which needs no GPU to compile for one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from hf_compressm.scans import boundary_triton

    if "nvidia" not in backends:
        pytest.skip("this Triton does not compile for NVIDIA's GPUs")
    kernel = getattr(boundary_triton, name)
    constants = {"TILE": boundary_triton.TILE, "BLOCK": boundary_triton.BLOCK}
    types = {"chunks": "i32", "state_size": "i32", **dict.fromkeys(constants, "constexpr")}
    signature = {argument: types.get(argument, f"*{dtype}") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument not in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    compiled = compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    accesses = set(re.findall(r"(?:ld|st)\.(?:global|shared|local)[.\w]*", compiled.asm["ptx"]))
    assert accesses == {f"{kind}.global.v2.b{dtype[2:]}" for kind in ("ld", "st")}
    assert compiled.metadata.shared == 0
