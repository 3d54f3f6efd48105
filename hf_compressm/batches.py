"""Calibration batches drawn from the Trainer's own data, leaving its order and every generator untouched."""

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset


def sample_batches(dataloader: DataLoader, batch_size: int, count: int, seed: int) -> list[Mapping[str, Any]]:
    """Collate `count` batches from a data loader's dataset.

    Map-style datasets are sampled without replacement by a generator of its own, the same for the same seed; of an
    iterable dataset the first examples of a fresh iteration are taken.

    Args:
        dataloader: its `dataset` and `collate_fn` are used; no iterator of it is made.
        batch_size: examples per batch.
        count: number of batches; fewer if the dataset is smaller.
        seed: of the sample.
    """
    dataset: Any = dataloader.dataset
    with generators_restored():
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            examples = list(itertools.islice(iter(dataset), batch_size * count))
        else:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(dataset), generator=generator)[: batch_size * count]
            examples = [dataset[index] for index in chosen.tolist()]
        groups = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        return [dataloader.collate_fn(group) for group in groups]


@contextmanager
def generators_restored() -> Iterator[None]:
    """Put back the state of Python's, NumPy's and torch's generators afterwards; collators and datasets may draw."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what must be kept
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
