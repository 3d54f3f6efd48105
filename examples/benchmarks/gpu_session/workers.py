"""A process for each way, which measures one figure after the other: importing and starting CUDA take longer."""

import gc
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from gpu_session.ways import force


READY = "ready"
BROKEN = ("CUDA error", "Triton Error [CUDA]")
"""In messages after which a process can no longer use its GPU."""


class Worker:
    """A process with one way.

    Args:
        way: that it is left with.
    """

    def __init__(self, way: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, way))
        self._process.start()
        theirs.close()  # so that its end is seen here
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.is_alive()

    def wait(self, limit: float) -> None:
        """Wait until it has started.

        Raises:
            RuntimeError: if it ended.
            TimeoutError: after so many seconds.
        """
        if not self._is_ready:
            self._receive(limit)
            self._is_ready = True

    def ask(self, work: Callable[..., Any], *arguments: Any, limit: float) -> Any:
        """What `work` returns there.

        Args:
            work: a function of a module.
            *arguments: for it.
            limit: seconds; a process that takes longer is ended.

        Raises:
            RuntimeError: if the work failed, or the process ended.
            TimeoutError: after so many seconds.
        """
        start = time.perf_counter()
        self.wait(limit)
        self._connection.send((work, arguments))
        value, error = self._receive(max(0.0, limit - (time.perf_counter() - start)))
        if any(text in error for text in BROKEN):
            self.end()
        if error:
            raise RuntimeError(error)
        return value

    def end(self, patience: float = 0.0) -> None:
        """End the process; with some seconds of patience it may do so by itself."""
        self._connection.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join()

    def _receive(self, limit: float) -> Any:
        """The next message."""
        try:
            if self._connection.poll(limit):
                return self._connection.recv()
        except EOFError:
            self.end(patience=5)
            raise RuntimeError(f"the process ended with exit code {self._process.exitcode}") from None
        self.end()
        raise TimeoutError(f"no answer after {limit:.0f} s")


def _serve(connection: Connection, way: str) -> None:
    """Answer until the other end is closed; the memory of a figure is free before the next."""
    force(way)
    connection.send(READY)
    while True:
        try:
            work, arguments = connection.recv()
        except EOFError:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            answer = work(*arguments), ""
        except Exception as error:  # a figure that fails must not keep the others from being measured
            answer = None, f"{type(error).__name__}: {str(error)[:500]}"
        connection.send(answer)
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
