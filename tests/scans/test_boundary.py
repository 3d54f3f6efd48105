"""Which implementation of the boundary recurrence runs, with stand-ins for the Triton kernels."""

import logging
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

import hf_compressm.scans.boundary as boundary
import hf_compressm.scans.trials as trials
from hf_compressm.scans import diagonal_scan
from hf_compressm.scans.diagonal import _choose_chunk_size


CPU = torch.device("cpu")
TRITON = "triton"
KERNELS = "hf_compressm.scans.boundary_triton"
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import hf_compressm.scans.trials as trials
from hf_compressm.scans import diagonal_scan
trials.KERNEL_DEVICES = frozenset({"cpu"})
b = torch.ones(1, 1, dtype=torch.complex64)
print(diagonal_scan(torch.ones(1, 100, 1), torch.tensor([0.5 + 0j]), b, b)[0, -1].item())
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Puts functions in the place of the kernels, and lets the CPU pass for a device of theirs."""
    triton = ModuleType(TRITON)
    triton.__spec__ = ModuleSpec(TRITON, loader=None)
    monkeypatch.setitem(sys.modules, TRITON, triton)
    monkeypatch.setattr(trials, "KERNEL_DEVICES", frozenset({"cpu"}))
    trials.working_kernel.cache_clear()

    def put(states=boundary.boundary_states, adjoint=boundary.boundary_adjoint):
        kernels = SimpleNamespace(boundary_states=states, boundary_adjoint=adjoint)
        monkeypatch.setitem(sys.modules, KERNELS, kernels)

    yield put
    trials.working_kernel.cache_clear()


def scan_arguments(length=100):
    eigenvalues = torch.polar(torch.rand(5).double(), torch.rand(5).double())
    matrices = torch.randn(5, 2, dtype=torch.complex128), torch.randn(3, 5, dtype=torch.complex128)
    tensors = torch.randn(2, length, 2).double(), eigenvalues, *matrices
    return [tensor.requires_grad_() for tensor in tensors]


def outputs_and_gradients(arguments):
    y = diagonal_scan(*arguments)
    return [y, *torch.autograd.grad(y.square().sum(), arguments)]


def raises(*_):
    raise RuntimeError("no kernel image\nfor this device")


def test_kernel_that_works_runs_both_ways(stand_in, caplog):
    calls = []

    def states(*args):
        calls.append("states")
        return boundary.boundary_states(*args)

    def adjoint(*args):
        calls.append("adjoint")
        return boundary.boundary_adjoint(*args)

    stand_in(states, adjoint)
    assert boundary.has_kernel(CPU, torch.complex128)
    assert calls == ["states", "adjoint"]  # the trial
    outputs_and_gradients(scan_arguments())
    assert calls == 2 * ["states", "adjoint"]
    assert boundary.has_kernel(CPU, torch.complex128)
    assert len(calls) == 4  # no second trial
    assert not caplog.records


def test_one_chunk_and_no_sequence_need_no_kernel(stand_in):
    calls = []
    stand_in(lambda *args: calls.append("states") or boundary.boundary_states(*args))
    boundary.has_kernel(CPU, torch.complex128)
    calls.clear()
    outputs_and_gradients(scan_arguments(length=1))
    u, *rest = scan_arguments()
    assert diagonal_scan(u[:0], *rest).shape == (0, 100, 3)
    assert not calls


def off(function, change):
    """A function with something done to one of its results."""

    def wrong(*args):
        result = function(*args)
        change(result if isinstance(result, torch.Tensor) else result[-1])
        return result

    return wrong


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"states": raises}, "RuntimeError: no kernel image"),
        ({"adjoint": raises}, "RuntimeError: no kernel image"),
        ({"states": off(boundary.boundary_states, lambda s: s[1, 18, 32].mul_(1.001))}, "units in the last place"),
        ({"adjoint": off(boundary.boundary_adjoint, lambda g: g[5].add_(1))}, "units in the last place"),
        ({"adjoint": off(boundary.boundary_adjoint, lambda g: g[5].fill_(float("nan")))}, "off by nan units"),
        (None, "ModuleNotFoundError"),
    ],
    ids=["raises forward", "raises backward", "wrong state", "wrong gradient", "NaN", "import fails"],
)
def test_kernel_that_fails_leads_to_one_warning_and_the_loop(stand_in, broken, reason, caplog, monkeypatch):
    arguments = scan_arguments()
    with monkeypatch.context() as patch:
        patch.setattr(trials, "KERNEL_DEVICES", frozenset())
        expected = outputs_and_gradients(arguments)
    trials.working_kernel.cache_clear()
    if broken is None:
        monkeypatch.setitem(sys.modules, KERNELS, None)  # importing it raises
    else:
        stand_in(**broken)
    with caplog.at_level(logging.DEBUG, logger=trials.__name__):
        runs = [outputs_and_gradients(arguments) for _ in range(2)]
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert reason in caplog.text
    assert "on cpu in torch.complex128" in caplog.text
    assert not boundary.has_kernel(CPU, torch.complex128)
    for actual in runs:
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.slow
def test_package_works_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert trials.__name__ not in done.stderr
    assert "diagonal scans" not in done.stderr
    assert float(done.stdout) == pytest.approx(2.0)  # 1 + 1/2 + 1/4 + ...


def test_triton_that_is_not_there_is_nothing_to_warn_of(stand_in, monkeypatch, caplog):
    stand_in(raises, raises)
    monkeypatch.setitem(sys.modules, TRITON, None)
    with caplog.at_level(logging.DEBUG, logger=trials.__name__):
        assert not boundary.has_kernel(CPU, torch.complex64)
    assert not caplog.records


def test_cpu_tensors_run_the_loop(stand_in, monkeypatch):
    monkeypatch.undo()  # the true device types
    trials.working_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, KERNELS, SimpleNamespace(boundary_states=raises, boundary_adjoint=raises))
    assert not boundary.has_kernel(CPU, torch.complex64)
    outputs_and_gradients(scan_arguments())


def test_trial_leaves_the_random_generator_alone(stand_in):
    stand_in()
    before = torch.get_rng_state()
    assert boundary.has_kernel(CPU, torch.complex64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("H", "state_size", "one_launch", "steps"),
    [
        (8, 256, False, 32),
        (128, 384, False, 4),
        (8, 256, True, 32),
        (128, 384, True, 2),
        (32, 64, True, 4),
        (32, 256, True, 8),
        (1, 4096, True, 32),
        (1024, 1, True, 2),
        (0, 1, True, 16),
    ],
)
def test_steps_per_chunk(H, state_size, one_launch, steps):
    assert _choose_chunk_size(784, H, H, state_size, one_launch) == steps
    assert _choose_chunk_size(1, H, H, state_size, one_launch) == 1
