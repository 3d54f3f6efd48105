"""Work on several layers at once: it is independent for each, and a small eigenproblem keeps only one core busy."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch


S = TypeVar("S")
T = TypeVar("T")


def for_each(work: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Apply `work` to all items at once, without gradients; the results are in the order of the items.

    The workers share the threads that PyTorch may use.

    Raises:
        Exception: the first error, in the order of the items.
    """
    items, threads = list(items), torch.get_num_threads()
    workers = min(len(items), threads)
    if workers <= 1:
        with torch.no_grad():
            return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(workers, initializer=_prepare, initargs=(threads // workers,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)  # threads that start later take the number that was set last, in any thread


def _prepare(threads: int) -> None:
    """Set up a worker: both settings belong to the calling thread alone."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
