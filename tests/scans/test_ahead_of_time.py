"""What Triton's compiler makes of every kernel for GPUs that are not there: a test of speed that needs no device.

Spilled registers and shared memory cost time that no run on a CPU shows. The inner loops are counted in instructions
per state and time step of one channel, of which those of the special function unit (exponentials) are the scarcest: a
multiprocessor starts 16 in a cycle, and 128 of the others.
"""

import importlib.util
import os

import pytest


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

GPUS = (80, 90, 100)  # compute capability 8.0, as of the A100, 9.0, of the H100, and 10.0, of the B200
IO = ("u", "delta", "z", "out", "grad_out", "grad_u", "grad_delta", "grad_z")
LANES = 32

LIMITS = {
    # kernel: special functions and all instructions per state and step; those seen are 2 to 10 % lower
    "local": (1, 5.2),
    "forward": (1, 7.2),
    "retrace": (1.25, 12.2),
    "backward": (1, 31.5),
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")


@pytest.fixture
def compiler():
    """The module that compiles; the newest GPUs need an assembler that an older Triton does not bring."""
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this Triton does not compile for NVIDIA's GPUs")
    from tests.scans import ahead_of_time

    return ahead_of_time


def selective(name, gpu, state_size):
    """A kernel of the selective scan, and what it is compiled for in a layer with so many states."""
    from hf_compressm.scans import selective_triton as scan

    is_forward = name in ("local", "forward")
    tiles = scan.FORWARD if is_forward else scan.backward_tiles(divmod(gpu, 10), state_size)
    given = {"SEGMENT": scan.SEGMENT, "TILE": tiles.steps, "BLOCK": tiles.channels, "SOFTPLUS": True, "HAS_BIAS": True}
    optional = {"local": (), "forward": ("D", "z"), "retrace": ("z",), "backward": ("D", "z")}[name]
    given |= {f"HAS_{argument.upper()}": True for argument in optional}
    return getattr(scan, f"{name}_kernel"), given, tiles


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "state_size"),
    [("local", 128), ("forward", 128), ("retrace", 12), ("retrace", 128), ("backward", 12), ("backward", 128)],
)
def test_selective_kernels(name, state_size, dtype, gpu, compiler):
    kernel, constants, tiles = selective(name, gpu, state_size)
    made = compiler.compiled(kernel, gpu, constants, dict.fromkeys(IO, f"*{dtype}"), num_warps=1)
    assert made.registers <= 255
    assert made.local == 0
    assert made.shared == 0
    (loop,) = [loop for loop in made.loops if loop[compiler.SPECIAL]]
    assert not loop["LDL"] + loop["STL"] + loop["BAR"]
    steps = tiles.steps * tiles.channels / LANES
    special, total = LIMITS[name]
    assert loop[compiler.SPECIAL] / steps <= special
    assert sum(loop.values()) / steps <= total


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("reverse", [False, True])
def test_carry(reverse, gpu, compiler):
    from hf_compressm.scans import selective_triton as scan

    constants = {"BLOCK": scan.CARRY_BLOCK, "REVERSED": reverse, "HAS_INITIAL": reverse}
    made = compiler.compiled(scan.carry_kernel, gpu, constants, {})
    assert (made.local, made.shared) == (0, 0)
    assert not any(loop["BAR"] for loop in made.loops)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("name", ["_states_kernel", "_adjoint_kernel"])
def test_boundary_kernels(name, dtype, gpu, compiler):
    from hf_compressm.scans import boundary_triton as boundary

    kernel = getattr(boundary, name)
    constants = {"TILE": boundary.TILE, "BLOCK": boundary.BLOCK}
    options = {"num_warps": 1, "enable_fp_fusion": True}
    made = compiler.compiled(kernel, gpu, constants, dict.fromkeys(kernel.arg_names, f"*{dtype}"), **options)
    assert made.accesses == {f"{kind}.global.v2.b{dtype[2:]}" for kind in ("ld", "st")}  # both parts at once
    assert (made.local, made.shared) == (0, 0)
    assert not any(loop["BAR"] for loop in made.loops)
