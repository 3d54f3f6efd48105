"""DistributedDataParallel learns of new parameters, and keeps what it was set up with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.surgery import find_wrappers, rebuild_reducers
from tests.family_table import LRU


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Seen:
    """A communication hook that notes which parameters' gradients are sent."""

    def __init__(self) -> None:
        self.parameters: set[int] = set()

    def hook(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.parameters |= {id(parameter) for parameter in bucket.parameters()}
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def step(wrapper: nn.Module, seen: Seen) -> set[int]:
    seen.parameters = set()
    wrapper.zero_grad()
    wrapper(**LRU.batch()).loss.backward()
    return seen.parameters


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_gradients_of_new_parameters_are_averaged(options: dict[str, Any]) -> None:
    model, seen = LRU.build(), Seen()
    wrapper = DistributedDataParallel(model, **options)
    wrapper.register_comm_hook(None, seen.hook)
    everything = {id(parameter) for parameter in model.parameters()}
    step(wrapper, seen)  # with a static graph, torch looks at it first
    assert step(wrapper, seen) == everything
    compress(model, CompreSSMConfig(fraction=0.5))
    new = {id(parameter) for parameter in model.parameters()}
    assert new != everything
    rebuild_reducers(wrapper)
    step(wrapper, seen)
    for _ in range(3):
        assert step(wrapper, seen) == new
    assert {id(parameter) for parameter in wrapper._module_parameters} == new
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_it_they_are_left_out() -> None:
    model, seen = LRU.build(), Seen()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    wrapper.register_comm_hook(None, seen.hook)
    step(wrapper, seen)
    compress(model, CompreSSMConfig(fraction=0.5))
    assert not {id(parameter) for parameter in model.parameters()} <= step(wrapper, seen)


def test_wrappers_are_found_inside_others() -> None:
    wrapper = DistributedDataParallel(nn.Linear(2, 2))
    assert list(find_wrappers(nn.Sequential(wrapper))) == [wrapper]
    rebuild_reducers(nn.Linear(2, 2))
