"""Rows in processes of their own, several at once: each as soon as the rows that it needs are done."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from rows import Row, Study, key_of


Job = tuple[Study, Row]


def needs(job: Job) -> set[str]:
    """Keys of the rows that have to be done before."""
    study, row = job
    return {key_of(study.name, name, row.seed) for name in (row.size_of, row.after) if name is not None}


def in_slots(
    jobs: Sequence[Job], work: Callable[[Job], Any], count: int, started: Callable[[Job], None]
) -> Iterator[tuple[Job, Future[Any]]]:
    """Do the work of all jobs, as many as `count` at once, in the order given where nothing has to be waited for.

    On a GPU a process does one row after the other, since there its peak of memory can be counted anew; elsewhere
    every row has a new one. Processes share the cores.

    Args:
        jobs: not done yet.
        work: to be done in another process.
        count: processes at once.
        started: is told of every job that begins.

    Yields:
        Every job with its future once it is over: done, failed, or killed.

    Raises:
        ValueError: if rows wait for one another.
    """
    waiting, running = list(jobs), dict[Future[Any], tuple[Job, ProcessPoolExecutor]]()
    free = [_new_process(count) for _ in range(min(count, len(waiting)))]
    while waiting or running:
        pending = {job[1].key for job in [*waiting, *(job for job, _ in running.values())]}
        for job in [job for job in waiting if not needs(job) & pending][: len(free)]:
            waiting.remove(job)
            process = free.pop()
            started(job)
            running[process.submit(work, job)] = (job, process)
        if not running:
            raise ValueError(f"These rows wait for one another: {', '.join(row.key for _, row in waiting)}.")
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, process = running.pop(future)
            yield job, future
            if future.exception() is not None or not torch.cuda.is_available():
                process.shutdown()
                process = _new_process(count)
            free.append(process)
    for process in free:
        process.shutdown()


def _new_process(count: int) -> ProcessPoolExecutor:
    """One of `count`; it starts with its first job."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(count,))


def _begin(count: int) -> None:
    """End with the parent, or a later command would find a row trained twice; leave to each of `count` its threads."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // count, 1))


def _end_with_parent() -> None:
    """Wait for the parent, and leave without a word."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
