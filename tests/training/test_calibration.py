"""Calibration batches: the sample is repeatable, and nobody else notices."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_compressm.training.calibration import sample_batches
from tests.family_table import same


class Drawing(Dataset):
    """Draws from every global generator, as an augmentation would."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict:
        random.random()
        np.random.rand()  # noqa: NPY002
        return {"index": index, "noise": torch.rand(2)}


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"index": index} for index in range(7))


@pytest.mark.parametrize("dataset", [Drawing(), Stream()])
def test_every_generator_is_as_before(dataset: Dataset) -> None:
    before = torch.get_rng_state(), random.getstate(), [*map(str, np.random.get_state())]  # noqa: NPY002
    sample_batches(DataLoader(dataset, batch_size=2), 2, 2, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [*map(str, np.random.get_state())] == before[2]  # noqa: NPY002


def test_the_seed_decides_and_no_example_comes_twice() -> None:
    loader = DataLoader(Drawing(), batch_size=3, shuffle=True)
    first, again, other = ([batch["index"] for batch in sample_batches(loader, 3, 4, seed=seed)] for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    assert [len(batch) for batch in first] == [3, 3, 3, 1]


@pytest.mark.parametrize(("count", "sizes"), [(1, [3]), (2, [3, 3]), (5, [3, 3, 1])])
def test_a_stream_gives_its_first_examples(count: int, sizes: list[int]) -> None:
    batches = sample_batches(DataLoader(Stream(), batch_size=3), 3, count, seed=0)
    assert [len(batch["index"]) for batch in batches] == sizes
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(sum(sizes)))
