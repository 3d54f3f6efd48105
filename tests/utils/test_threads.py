"""Layers at once: the results in order, the first error, and nobody else's threads or gradients changed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_compressm.utils.threads import for_each


def test_results_come_in_the_order_of_the_items_without_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    found = for_each(lambda i: (weight * i, torch.is_grad_enabled()), range(17))
    assert [int(value) for value, _ in found] == list(range(17))
    assert not any(value.requires_grad or enabled for value, enabled in found)
    assert torch.is_grad_enabled()
    assert for_each(lambda i: i, []) == []


def test_the_items_share_the_threads_and_give_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    here = threading.get_ident()
    together = threading.Barrier(2)  # breaks unless two items run at the same time

    def work(_: int) -> bool:
        together.wait(timeout=60)
        return threading.get_ident() != here

    assert all(for_each(work, range(2)))
    assert given == [2, 2, 4]


def test_later_threads_have_as_many_as_before() -> None:
    before = torch.get_num_threads()
    for_each(lambda i: torch.ones(3) * i, range(5))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


def test_the_first_error_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        for_each(lambda i: 1 / (i - 2), range(4))
    assert torch.is_grad_enabled()
