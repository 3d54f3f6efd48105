"""Tensors in few bytes."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from hf_compressm.utils.packing import is_packable, pack
from hf_compressm.utils.processes import dump, load


LIMITS = torch.iinfo(torch.int64)
RANDOM = torch.Generator().manual_seed(0)
TENSORS = {
    "indices": torch.randperm(1000, generator=RANDOM).view(10, 100),
    "a range": torch.arange(10_000),
    "the largest steps": torch.tensor([LIMITS.min, LIMITS.max, 0, LIMITS.max, LIMITS.min]),
    "one-hot rows": torch.eye(200, dtype=torch.float64)[::3],
    "signs of zero": torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0]),
    "not a number": torch.tensor([float("nan"), float("inf"), -float("inf")]),
    "bfloat16": torch.randn(3, 5, generator=RANDOM).bfloat16(),
    "complex": torch.randn(4, dtype=torch.complex128, generator=RANDOM),
    "conjugated": torch.randn(4, dtype=torch.complex64, generator=RANDOM).conj(),
    "transposed": torch.randn(4, 3, generator=RANDOM).mT,
    "truth": torch.tensor([True, False, True]),
    "a number": torch.tensor(0.3, dtype=torch.float64),
    "one index": torch.tensor(7),
    "nothing": torch.zeros(0, 3),
    "no indices": torch.zeros(0, dtype=torch.int64),
}


def bits(tensor: Tensor) -> bytes:
    return tensor.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_packed_tensors_come_back_to_the_last_bit(tensor: Tensor) -> None:
    assert is_packable(tensor)
    back = load(dump({"it": tensor}, None), None)["it"]
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    assert bits(back) == bits(tensor)
    assert back.is_contiguous()


@pytest.mark.parametrize("name", ["a range", "one-hot rows"])
def test_ranges_and_zeros_take_next_to_nothing(name: str) -> None:
    tensor = TENSORS[name]
    assert 40 * len(pickle.dumps(pack(tensor))) < tensor.numel() * tensor.element_size()


def test_a_view_is_sent_without_what_is_around_it_and_one_tensor_once() -> None:
    wide = torch.randn(1000, 1000, generator=RANDOM)
    view = wide[:2, :2]
    assert len(dump(view, None)) < 500
    twice = load(dump([wide, wide], None), None)
    assert twice[0] is twice[1]


def test_other_tensors_are_left_to_pickle() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert not any(map(is_packable, (weight, torch.ones(2, requires_grad=True), torch.ones(2).to_sparse(), 3)))
    assert torch.equal(load(dump(weight, None), None), weight)
    assert not is_packable(torch.ones(2, device="meta"))
