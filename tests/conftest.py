"""Every test starts from the same seeds, offline, with an empty Hub cache of its own process."""

import atexit
import os
import shutil
import tempfile


HUB_CACHE = tempfile.mkdtemp(prefix="hf-compressm-tests-")
atexit.register(shutil.rmtree, HUB_CACHE, ignore_errors=True)
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = os.cpu_count() or 1
THREADS = max(1, min(CORES // WORKERS, int(os.environ.get("OMP_NUM_THREADS") or CORES)))

# Libraries read these when they are imported, so they are set first; processes that a test starts inherit them.
os.environ.update(
    {
        "HF_HOME": HUB_CACHE,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": str(THREADS),  # several test processes with all cores each are slower than one
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
)

import errno  # noqa: E402
import fcntl  # noqa: E402
import ipaddress  # noqa: E402 - the environment comes before every import that might read it
import random  # noqa: E402
import socket  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from hf_compressm.families import Mamba2Family  # noqa: E402
from hf_compressm.families.delta_projected import ProjectingFamily  # noqa: E402


SEED = 0
FEW_STEPS = 2


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def is_loopback(address: object) -> bool:
    """Tells whether a socket address stays on this machine; anything but (host, port, ...) is a local path."""
    if not isinstance(address, tuple):
        return True
    host = address[0]
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def only_loopback() -> Iterator[None]:
    """Fails the test that opens a connection to another machine, even where a library would swallow the error."""

    def guarded(connect: Callable) -> Callable:
        def connect_to(self: socket.socket, address: object) -> object:
            if not is_loopback(address):
                pytest.fail(f"a test tried to reach {address!r}; tests stay on this machine")
            return connect(self, address)

        return connect_to

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Seeds the global generators before a test, and puts back afterwards the global settings that it changed."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - transformers and datasets draw from the global generator
    torch.manual_seed(SEED)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    algorithms, grad = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(algorithms)
    torch.set_grad_enabled(grad)


@pytest.fixture(autouse=True)
def short_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut of Mamba-2 or of linear attention is fitted in a few steps where a test does not say how many."""
    for family in (Mamba2Family, ProjectingFamily):
        monkeypatch.setattr(family, "refit_steps", FEW_STEPS)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Windows does not do: flush a file that is open for reading alone, and open a directory."""
    fsync, open_file = os.fsync, os.open

    def needs_writing(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fsync(descriptor)

    def no_directories(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path) and "dir_fd" not in kwargs:  # by which shutil.rmtree opens them, and not on Windows
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", needs_writing)
    monkeypatch.setattr(os, "open", no_directories)
