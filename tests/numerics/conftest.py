"""Small matrices: threads that wait for each other cost more than they save."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(deterministic: None) -> None:
    torch.set_num_threads(1)  # `deterministic` puts the number back
