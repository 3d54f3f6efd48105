"""What the Triton kernels must do, on the device of KERNEL_DEVICE; `test_triton.py` runs this file.

On a CPU the kernels run in Triton's interpreter, which looks at TRITON_INTERPRET when Triton is imported: this file
needs a process of its own.
"""

import os

import pytest
import torch

import hf_compressm.scans.boundary as boundary
import hf_compressm.scans.boundary_triton as boundary_triton
import hf_compressm.scans.diagonal as diagonal
import hf_compressm.scans.trials as trials
from hf_compressm.scans import diagonal_scan, diagonal_scan_reference
from tests.scans.test_diagonal import CASES, assert_all_close, make, outputs_and_gradients, poisoned_empty


DEVICE = os.environ["KERNEL_DEVICE"]
ROUND_OFF = {torch.complex64: 1e-4, torch.complex128: 1e-12}  # relative to the largest entry; the same sums, fused
TILE, BLOCK = boundary_triton.TILE, boundary_triton.BLOCK

SHAPES = {
    # name: (batch, chunks, N)
    "one chunk": (2, 1, 5),
    "below a tile": (2, TILE - 1, 5),
    "one tile, batch 1": (1, TILE, 5),
    "above a tile": (2, TILE + 1, 5),
    "many tiles": (2, 4 * TILE + 5, 3),
    "N 1": (3, TILE + 3, 1),
    "one block": (1, 3, BLOCK),
    "above a block": (2, 3, BLOCK + 1),
}
if DEVICE == "cuda":  # the interpreter would take minutes
    SHAPES |= {"a layer": (50, 393, 257), "a long sequence": (2, 20_001, 48)}

__all__ = ["poisoned_empty"]  # a fixture


@pytest.fixture(scope="module")
def kernel_in_use():
    """Lets `boundary_scan` choose the kernel on this device, which it must find to work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "KERNEL_DEVICES", frozenset({DEVICE}))
        trials.working_kernel.cache_clear()
        device = torch.zeros(1, device=DEVICE).device
        assert boundary.has_kernel(device, torch.complex64)
        assert boundary.has_kernel(device, torch.complex128)
        yield
    trials.working_kernel.cache_clear()


@pytest.fixture
def launches(kernel_in_use, monkeypatch):
    """The list of the kernels that were launched."""
    launched = []

    def launch(kernel, *args, original=boundary_triton._launch):
        launched.append(kernel)
        return original(kernel, *args)

    monkeypatch.setattr(boundary_triton, "_launch", launch)
    return launched


def arguments(batch, chunks, state_size, dtype=torch.complex128):
    """Decay with the values that are special (0, angle 0, modulus 1), v, s_0 and the gradient of the states."""
    decay = torch.polar(torch.rand(state_size).double(), 6 * torch.rand(state_size).double())
    decay[:3] = torch.tensor([1.0, 0.0, 1j])[:state_size]
    shapes = (batch, chunks, state_size), (batch, state_size), (batch, chunks + 1, state_size)
    tensors = decay, *(torch.randn(shape, dtype=torch.complex128) for shape in shapes)
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def results(implementation, decay, inputs, initial_state, grad_states):
    """States, adjoint and gradient of decay."""
    states = implementation.boundary_states(decay, inputs, initial_state)
    return states, *implementation.boundary_adjoint(decay, states, grad_states)


def assert_same(actual, expected, dtype):
    for name, left, right in zip(("states", "adjoint", "grad_decay"), actual, expected, strict=True):
        assert left.shape == right.shape, name
        assert (left - right).abs().max() <= ROUND_OFF[dtype] * right.abs().max(), name  # false for NaN


@pytest.mark.parametrize("dtype", ROUND_OFF)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_loop(shape, dtype, poisoned_empty):
    given = arguments(*SHAPES[shape], dtype)
    assert_same(results(boundary_triton, *given), results(boundary, *given), dtype)


def test_strided_and_conjugated_arguments():
    decay, inputs, initial_state, grad_states = arguments(2, 9, 5)
    expected = results(boundary, decay.conj(), inputs.conj(), initial_state, grad_states.conj())
    strided = (
        torch.stack([decay, decay], dim=1)[:, 0].conj(),
        inputs.transpose(0, 2).contiguous().transpose(0, 2).conj(),
        initial_state.T.contiguous().T,
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual = results(boundary_triton, *strided, grad_states.conj())  # in one piece, and conjugated all the same
    assert_same(actual, expected, torch.complex128)


def test_arguments_are_not_changed_and_two_runs_agree_to_the_bit():
    given = arguments(2, 9, 5)
    copies = [tensor.clone() for tensor in given]
    runs = [results(boundary_triton, *given) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(given, copies, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", ["odd", "batch 1", "N 1", "H 1, P 1"])
def test_scan_on_the_kernel_equals_reference(case, reverse, launches, monkeypatch, poisoned_empty):
    monkeypatch.setattr(diagonal, "_choose_chunk_size", lambda *_: 4)  # 10 to 25 chunks, and a rest but in one case
    tensors = [tensor.to(DEVICE).requires_grad_() for tensor in make(*CASES[case], requires_grad=False)]
    with torch.device(DEVICE):
        actual = outputs_and_gradients(diagonal_scan, tensors, reverse=reverse)
        assert launches == [boundary_triton._states_kernel, boundary_triton._adjoint_kernel]
        expected = outputs_and_gradients(diagonal_scan_reference, tensors, reverse=reverse)
    assert_all_close(actual, expected)


def test_gradcheck(launches):
    decay, inputs, initial_state, _ = arguments(1, 2, 2)
    tensors = [tensor.requires_grad_() for tensor in (decay, inputs, initial_state)]
    assert torch.autograd.gradcheck(boundary.boundary_scan, tensors)
    assert boundary_triton._adjoint_kernel in launches
