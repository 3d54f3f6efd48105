"""The processes that train one model together: sums over them, decisions that are made once, and comparisons.

Each process has a copy of the model. Eigensolvers of two machines need not agree to the last bit, and copies that were
cut in two ways can never be averaged again. So the first process plans, and the others receive its plan.
"""

import io
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_compressm.utils.packing import is_packable, pack


T = TypeVar("T")
Sums = dict[str, Tensor]


class Processes:
    """A group of processes that run the same steps; a single process is the usual case, and costs nothing.

    Every method but `share` is a collective: all processes call it, in the same order.

    Args:
        size: number of processes; more than 1 need torch's default process group.
        rank: place of this process, counted from 0.
    """

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        """Store the size and the rank."""
        self.size = size
        self.rank = rank

    @classmethod
    def current(cls) -> "Processes":
        """The processes of torch's default process group; this process alone if there is no group."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_world_size(), dist.get_rank())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of the items: every `size`-th one, so that the shares together are all items."""
        return list(items[self.rank :: self.size])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make an error in one process an error in all of them.

        Raises:
            Exception: the error of the first process that had one, in every process.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            if self.size == 1:
                raise
            error = own
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, None if error is None else _sendable(error, self.rank))
        first = next((found for found in every if found is not None), None)
        if first is not None:
            raise first from error

    def first(self, work: Callable[[], T], model: nn.Module | None = None) -> T:
        """Do the work in the first process only, and return its result in all of them.

        Args:
            work: function that does the work.
            model: its modules and parameters in the result become those of each process's own copy.

        Raises:
            Exception: the error of the work, in every process.
        """
        if self.size == 1:
            return work()
        sent: list[Any] = [None, None]
        if self.is_first:
            try:
                sent[0] = dump(work(), model)
            except Exception as error:
                sent[1] = _sendable(error, self.rank)
        dist.broadcast_object_list(sent, src=0)
        if sent[1] is not None:
            raise sent[1]
        return load(sent[0], model)

    def add_up(self, sums: Sequence[Sums], device: torch.device | str = "cpu") -> list[Sums]:
        """Sum tables of tensors over the processes; a process that lacks an entry adds nothing to it.

        Args:
            sums: tables of float64 tensors, equally many in each process; the first process has every entry.
            device: a device on which the processes' backend can add tensors.

        Returns:
            The sums in the first process; in the others, the tables as they were.
        """
        if self.size == 1:
            return list(sums)
        shapes = self.first(lambda: [{name: value.shape for name, value in table.items()} for table in sums])
        added = []
        for table, wanted in zip(sums, shapes, strict=True):
            zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in wanted.items()}
            values = [table.get(name, zeros[name]) for name in wanted]
            flat = torch.cat([value.flatten() for value in values]).to(device) if values else torch.zeros(0)
            if values:
                dist.reduce(flat, dst=0)
            pieces = flat.cpu().split([value.numel() for value in values])
            whole = {name: piece.view(wanted[name]) for name, piece in zip(wanted, pieces, strict=True)}
            added.append(whole if self.is_first else table)
        return added

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def compare(self, tensors: Callable[[], Sequence[Tensor]], what: str) -> None:
        """Make sure that some tensors are the same in all processes, to the last bit.

        Args:
            tensors: function that returns the tensors; it is not called for a single process.
            what: name of the tensors in the error message.

        Raises:
            RuntimeError: in every process, if the tensors differ.
        """
        if self.size == 1:
            return
        found = self.gather(checksum(*tensors()))
        different = [rank for rank, value in enumerate(found) if value != found[0]]
        if different:
            raise RuntimeError(
                f"{what} differ between the processes: those of process {different[0]} are not those of process 0. "
                "Start all processes from the same weights and the same checkpoint."
            )


ALONE = Processes()


def checksum(*tensors: Tensor) -> int:
    """CRC-32 of tensors' bits, since torch's version counter misses fused optimizers and writes through `.data`."""
    value = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().flatten()  # a single entry may have any stride until it is copied
        bits = flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        value = zlib.crc32(bits.numpy().tobytes(), value)
    return value


def _sendable(error: Exception, rank: int) -> Exception:
    """The error in a form that another process can unpickle."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"Process {rank} failed: {type(error).__name__}: {error}")


def dump(value: Any, model: nn.Module | None) -> bytes:
    """Pickle a value for `first`, with names in place of the model's modules and parameters, and tensors packed."""
    named = [*model.named_modules(), *model.named_parameters()] if model is not None else []
    names = {id(part): (isinstance(part, nn.Module), name) for name, part in named}
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> Any:
            return names.get(id(part)) if isinstance(part, nn.Module | nn.Parameter) else None

        def reducer_override(self, part: Any) -> Any:
            return pack(part) if is_packable(part) else NotImplemented

    Pickler(buffer).dump(value)
    return buffer.getvalue()


def load(data: bytes, model: nn.Module | None) -> Any:
    """The unpickled value, with this process's modules and parameters in place of their names."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: tuple[bool, str]) -> Any:
            assert model is not None  # `dump` was given one
            return model.get_submodule(place[1]) if place[0] else model.get_parameter(place[1])

    return Unpickler(io.BytesIO(data)).load()
