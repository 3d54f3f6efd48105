import os
import random
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import is_loopback


DRAWS: list[tuple[float, float, float]] = []


@pytest.mark.parametrize("_attempt", range(2))
def test_every_test_draws_the_same_numbers(_attempt):
    DRAWS.append((random.random(), float(np.random.random()), float(torch.rand(()))))  # noqa: NPY002 - the point
    assert DRAWS[0] == DRAWS[-1]


def test_global_settings_are_put_back_a():
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)


def test_global_settings_are_put_back_b():
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


def test_the_hub_is_offline_here_and_in_a_child_process():
    code = "import huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE, c.HF_HOME)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["True", os.environ["HF_HOME"]]


@pytest.mark.parametrize("address", [("127.0.0.1", 80), ("::1", 80, 0, 0), ("localhost", 80), "/tmp/a.sock"])
def test_local_addresses_are_let_through(address):
    assert is_loopback(address)


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0), ("example.org", 80)])
def test_other_machines_are_refused(address):
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with socket.socket(family) as client, pytest.raises(pytest.fail.Exception, match="tests stay on this machine"):
        client.connect(address)
