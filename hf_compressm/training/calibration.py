"""Calibration batches drawn from the Trainer's own data, leaving its order and every generator untouched."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset

from hf_compressm.utils.processes import ALONE, Processes
from hf_compressm.utils.randomness import undisturbed


def sample_batches(
    dataloader: DataLoader, batch_size: int, count: int, seed: int, processes: Processes = ALONE
) -> list[Mapping[str, Any]]:
    """Collate `count` batches from a data loader's dataset.

    A map-style dataset is sampled without replacement, by a separate generator that depends only on the seed. From an
    iterable dataset, the first examples of a fresh iteration are taken.

    Args:
        dataloader: its `dataset` and `collate_fn` are used; no iterator of it is made.
        batch_size: examples per batch.
        count: number of batches; fewer if the dataset is smaller.
        seed: seed of the sample.
        processes: the processes that sample together; each gets its share of the same batches, perhaps none.
    """
    dataset: Any = dataloader.dataset
    while isinstance(dataset, IterableDatasetShard):  # this process's view of the same data
        dataset = dataset.dataset
    with undisturbed():
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            examples = list(itertools.islice(iter(dataset), batch_size * count))
            groups = processes.share(_grouped(examples, batch_size))
        else:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(dataset), generator=generator)[: batch_size * count].tolist()
            groups = [[dataset[index] for index in group] for group in processes.share(_grouped(chosen, batch_size))]
        return [dataloader.collate_fn(group) for group in groups]


def _grouped(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
