"""Maps along one axis, term by term."""

import pytest
import torch

from hf_compressm.families.maps import apply_in_order, apply_map


RANDOM = torch.Generator().manual_seed(0)
MIXING = torch.block_diag(torch.eye(3).double()[[0, 2]], torch.rand(2, 4, generator=RANDOM).double())
MAPS = {
    "selects and mixes": MIXING,
    "mixes all": torch.rand(5, 7, generator=RANDOM).double(),
    "an empty row": torch.zeros(2, 7).double(),
    "a factor": torch.tensor(0.3).double(),
}
ROUND_OFF = {"atol": 1e-14, "rtol": 1e-14}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("matrix", MAPS.values(), ids=MAPS)
def test_terms_in_order_add_up_to_the_product(matrix: torch.Tensor, dim: int) -> None:
    value = torch.randn(7, 7, 3, generator=RANDOM)
    found = apply_in_order(value, matrix, dim)
    torch.testing.assert_close(found, apply_map(value, matrix, dim), **ROUND_OFF)


def test_each_group_has_a_map_of_its_own() -> None:
    value, matrix = torch.randn(2, 7, generator=RANDOM), torch.rand(2, 5, 7, generator=RANDOM).double()
    torch.testing.assert_close(apply_in_order(value, matrix, 1), apply_map(value, matrix, 1), **ROUND_OFF)


def test_the_order_is_that_of_the_old_entries() -> None:
    value = torch.tensor([1.0, 2.0**-53, 2.0**-53, -1.0]).double()
    ones = torch.ones(1, 4).double()
    assert apply_in_order(value, ones, 0).item() == 0.0  # each small term is lost beside 1
    assert apply_in_order(value.flip(0), ones, 0).item() == 0.0 - 1 + 2.0**-53 + 2.0**-53 + 1
