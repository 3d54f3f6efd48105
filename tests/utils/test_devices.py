"""Tensors between host and device."""

import pytest
import torch

from examples.benchmarks.pretend_device import OnDevice, PretendDevice
from hf_compressm.utils.devices import first_not_finite, on_host, to_device


def test_tensors_move_in_one_copy_for_each_dtype() -> None:
    wanted = {
        "weight": torch.randn(3, 4).T,
        "order": torch.arange(3),
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 2),
    }
    with PretendDevice() as device:
        moved = on_host(device.on_device(wanted))
    assert device.blocking == {"to the host": 2}
    assert moved.keys() == wanted.keys()
    assert all(torch.equal(moved[name], wanted[name]) for name in wanted)
    held = torch.zeros(2)
    assert on_host({"held": held})["held"].data_ptr() == held.data_ptr()  # no copy of what is there already


def test_a_tensor_goes_to_a_device_without_a_wait() -> None:
    with PretendDevice() as device:
        there = to_device(torch.arange(3), device.on_device(torch.zeros(1)).device)
    assert isinstance(there, OnDevice)
    assert not device.blocking


def test_a_tensor_that_comes_to_the_host_is_waited_for() -> None:
    with PretendDevice() as device:
        to_device(device.on_device(torch.arange(3)), torch.device("cpu"))
    assert device.blocking == {"to the host": 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_tensor_that_is_not_finite_is_found_with_one_question(bad: float) -> None:
    tensors = [torch.zeros(2), torch.arange(3), torch.tensor([0.0, bad]), torch.tensor(bad)]
    assert first_not_finite([]) is None
    assert first_not_finite(tensors[:2]) is None
    assert first_not_finite(tensors) == 2
    with PretendDevice() as device:
        there = [device.on_device(tensor) for tensor in tensors]
        assert first_not_finite(there) == 2
        assert device.count == 1
        assert first_not_finite([there[0], tensors[3], there[2]]) == 1
