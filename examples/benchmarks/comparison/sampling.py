"""The same batches of a data loader's dataset again and again, for what is compared with itself."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_compressm.utils.randomness import undisturbed


def fixed_batches(dataloader: DataLoader, batch_size: int, count: int, seed: int) -> list[Any]:
    """Collate `count` batches of examples chosen by a seed; the order of the loader stays as it was."""
    dataset: Any = dataloader.dataset
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset), generator=generator)[: batch_size * count].split(batch_size)
    with undisturbed():
        return [dataloader.collate_fn([dataset[index] for index in group.tolist()]) for group in chosen]
