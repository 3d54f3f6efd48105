"""What the Triton kernels of the selective scan must do, on the device of KERNEL_DEVICE.

`test_triton.py` runs this file. On a CPU the kernels run in Triton's interpreter, which looks at
TRITON_INTERPRET when Triton is imported: this file needs a process of its own.
"""

import os

import pytest
import torch

import hf_compressm.scans.selective_kernel as selective_kernel
import hf_compressm.scans.selective_triton as selective_triton
import hf_compressm.scans.trials as trials
from hf_compressm.scans import selective_scan, selective_scan_reference
from tests.scans.test_selective import NAMES, poisoned_empty


DEVICE = os.environ["KERNEL_DEVICE"]
SINGLE_ROUND_OFF = 1e-6  # relative to the largest entry
HALF_ROUND_OFF = {torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the results; the interpreter cuts bfloat16 off
SEGMENT = 8  # in the interpreter, which takes its time for every step of a segment

SHAPES = {
    # name: (batch, channels, N, length)
    "one step": (1, 3, 2, 1),
    "one state": (2, 5, 1, SEGMENT),
    "above a segment": (1, 5, 2, SEGMENT + 1),
    "many segments": (1, 3, 2, 5 * SEGMENT + 3),
    "33 states": (1, 3, 33, 9),
    "above a block": (1, 130, 2, 9),
    "batch 3": (3, 2, 3, 2 * SEGMENT),
    "length 300": (1, 2, 1, 300),
}
if DEVICE == "cuda":  # the interpreter would take minutes
    SEGMENT = selective_triton.SEGMENT
    SHAPES |= {"a layer": (2, 1536, 128, 1000), "twelve states": (3, 200, 12, 300), "65 states": (2, 131, 65, 513)}

__all__ = ["poisoned_empty"]  # a fixture


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels run on this device, whatever their trial would say; the list of the scans that they ran."""
    monkeypatch.setattr(selective_triton, "SEGMENT", SEGMENT)
    monkeypatch.setattr(selective_kernel, "working_kernel", lambda *_: selective_triton)
    ran = []
    for name in ("selective_forward", "selective_backward"):
        original = getattr(selective_triton, name)
        monkeypatch.setattr(
            selective_triton, name, lambda *args, name=name, run=original: ran.append(name) or run(*args)
        )
    return ran


def arguments(batch, channels, N, length, dtype=torch.float32, without=()):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sequence = (batch, channels, length)
    tensors = {
        "u": normal(*sequence).to(dtype),
        "delta": (normal(*sequence) - 2).to(dtype),
        "A": -torch.exp(normal(channels, N)),
        "B": normal(batch, N, length).to(dtype),
        "C": normal(batch, N, length).to(dtype),
        "D": normal(channels),
        "z": normal(*sequence).to(dtype),
        "delta_bias": 0.3 * normal(channels),
    }
    assert list(tensors) == list(NAMES)
    return {name: None if name in without else tensor.to(DEVICE) for name, tensor in tensors.items()}


def results(scan, given, dtype=None, softplus=True):
    """Output, last state and gradients by name, in float64."""
    leaves = {
        name: tensor.to(dtype or tensor.dtype).detach().clone().requires_grad_()
        for name, tensor in given.items()
        if tensor is not None
    }
    out, last = scan(**(given | leaves), delta_softplus=softplus, return_last_state=True)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator).to(DEVICE) for each in (out, last)]
    loss = (out * weights[0]).sum() + (last * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "last": last} | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error, largest = (actual[name].double() - value.double()).abs().max(), value.abs().max()
        assert actual[name].shape == value.shape
        assert error <= tolerance * largest, (name, float(error), float(largest))  # false for NaN


def check(given, tolerance=SINGLE_ROUND_OFF, softplus=True):
    exact = results(selective_scan_reference, given, torch.float64, softplus)
    assert_close(results(selective_scan, given, softplus=softplus), exact, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_in_double_precision(shape, kernels, poisoned_empty):
    check(arguments(*SHAPES[shape]))
    assert kernels == ["selective_forward", "selective_backward"]


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(without, softplus, kernels):
    given = arguments(1, 3, 2, SEGMENT + 3, without=without)
    if not softplus:
        given["delta"] = 0.1 * given["delta"].abs()
        given["delta_bias"] = None if given["delta_bias"] is None else given["delta_bias"].abs()
    check(given, softplus=softplus)
    assert kernels == ["selective_forward", "selective_backward"]


@pytest.mark.parametrize("dtype", HALF_ROUND_OFF)
def test_16_bits(dtype):
    given = arguments(1, 3, 2, SEGMENT + 3, dtype)
    check(given, HALF_ROUND_OFF[dtype])
    found = results(selective_scan, given)
    assert found["out"].dtype == found["grad B"].dtype == dtype
    assert found["last"].dtype == found["grad A"].dtype == torch.float32


@pytest.mark.parametrize("tiles", ["BACKWARD", "BACKWARD_MANY_STATES", "BACKWARD_ELSEWHERE"])
def test_tiles_of_every_gpu(tiles, monkeypatch):
    monkeypatch.setattr(selective_triton, "backward_tiles", lambda *_: getattr(selective_triton, tiles))
    check(arguments(1, 70, 2, SEGMENT + 3))


def test_groups_of_channels():
    given = arguments(1, 4, 2, SEGMENT + 3)
    given["B"] = torch.stack([given["B"], -given["B"]], dim=1)
    check(given)


def test_a_batch_that_is_too_large_for_the_scratch(monkeypatch):
    given = arguments(3, 2, 2, SEGMENT + 3)
    together = results(selective_scan, given)
    monkeypatch.setattr(selective_triton, "SCRATCH_ENTRIES", 1)
    assert_close(results(selective_scan, given), together, SINGLE_ROUND_OFF)


def test_only_one_result_has_a_gradient():
    given = arguments(1, 3, 2, SEGMENT + 3)
    for place in (0, 1):
        grads = []
        for scan in (selective_scan, selective_scan_reference):
            A = given["A"].clone().requires_grad_()
            loss = scan(**(given | {"A": A}), delta_softplus=True, return_last_state=True)[place].square().sum()
            grads.append(torch.autograd.grad(loss, A)[0])
        assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[1].abs().max()  # the reference is in float32 here


def test_arguments_are_not_changed_and_two_runs_agree_to_the_bit():
    given = arguments(2, 5, 3, SEGMENT + 3)
    copies = {name: tensor.clone() for name, tensor in given.items()}
    runs = [results(selective_scan, given) for _ in range(2)]
    assert all(torch.equal(given[name], copy) for name, copy in copies.items())
    assert all(torch.equal(runs[0][name], value) for name, value in runs[1].items())


def test_double_precision_and_empty_tensors_need_no_kernel(kernels):
    given = arguments(2, 3, 2, 5)
    selective_scan(**{name: tensor.double() for name, tensor in given.items()})
    empty = {name: tensor[:0] if tensor.dim() == 3 else tensor for name, tensor in given.items()}
    assert selective_scan(**empty).shape == (0, 3, 5)
    assert not kernels


def test_whole_graph_with_the_kernels_inside(kernels):
    given = arguments(1, 3, 2, SEGMENT + 3)

    def scan(**tensors):
        return selective_scan(**tensors)

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    assert_close(results(compiled, given), results(selective_scan, given), SINGLE_ROUND_OFF)
    assert kernels.count("selective_backward") == 2


def test_trial(monkeypatch):
    monkeypatch.undo()
    if DEVICE == "cpu":
        monkeypatch.setattr(trials, "KERNEL_DEVICES", frozenset({DEVICE}))
        monkeypatch.setattr(selective_triton, "SEGMENT", SEGMENT)
        monkeypatch.setattr(selective_kernel, "TRIAL_STEPS", SEGMENT + 3)
    trials.working_kernel.cache_clear()
    with torch.inference_mode():
        assert selective_kernel.has_kernel(torch.zeros(1, device=DEVICE).device)
    monkeypatch.setattr(selective_triton, "LOG2_E", 1.45)  # a mistake in the third digit
    trials.working_kernel.cache_clear()
    assert not selective_kernel.has_kernel(torch.zeros(1, device=DEVICE).device)
    trials.working_kernel.cache_clear()
