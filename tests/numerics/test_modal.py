import math

import pytest
import torch

from hf_compressm.numerics import DiagonalSystem
from hf_compressm.numerics.modal import gain_ratio, modal_form
from tests.numerics.systems import dense_markov, random_system


RESPONSE = 1e-11
"""Relative to the largest Markov parameter: round-off times the condition of a random eigenvector matrix."""
STEPS = 50


def dense(order: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable dense system of two inputs and three outputs."""
    A, B, C = (torch.randn(*shape, dtype=dtype) for shape in ((order, order), (order, 2), (3, order)))
    return 0.95 * A / torch.linalg.eigvals(A).abs().max(), B, C


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("order", [1, 2, 7, 12])
def test_the_modal_form_has_the_same_response(order: int, dtype: torch.dtype) -> None:
    A, B, C = dense(order, dtype)
    modes = modal_form(A, B, C, gain_ratio=3.0)
    assert modes is not None
    expected = torch.from_numpy(dense_markov(A.numpy(), B.numpy(), C.numpy(), STEPS)).real
    found = modes.system.impulse_response(STEPS)
    torch.testing.assert_close(found, expected, rtol=0, atol=RESPONSE * float(expected.abs().max()))
    # There and back: a real state is Re(to_state from_state x).
    there_and_back = modes.to_state @ modes.from_state
    if dtype == torch.float64:
        there_and_back = there_and_back.real
    torch.testing.assert_close(there_and_back, torch.eye(order, dtype=dtype), rtol=0, atol=RESPONSE * order)


@pytest.mark.parametrize("ratio", [0.01, 1.0, 50.0])
def test_gains_are_brought_to_the_ratio(ratio: float) -> None:
    modes = modal_form(*dense(6, torch.float64), gain_ratio=ratio)
    quotients = modes.system.B.norm(dim=1) / modes.system.C.norm(dim=0)
    torch.testing.assert_close(quotients, torch.full_like(quotients, ratio), rtol=1e-12, atol=0)
    assert gain_ratio(modes.system) == pytest.approx(ratio)


def test_slots_without_input_or_output_stay_as_they_are() -> None:
    A = torch.diag(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    B, C = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0, 0.0, 4.0]])
    modes = modal_form(A, B, C)
    assert modes.system.is_finite
    assert modes.system.impulse_response(2)[:, 0, 0].tolist() == pytest.approx([8.0, 0.8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_jordan_block_is_not_diagonalised(dtype: torch.dtype) -> None:
    A = 0.5 * torch.eye(3, dtype=dtype) + torch.diag(torch.ones(2, dtype=dtype), 1)
    assert modal_form(A, torch.ones(3, 1, dtype=dtype), torch.ones(1, 3, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_not_diagonalised(value: float, dtype: torch.dtype) -> None:
    A, B, C = dense(4, dtype)
    A[1, 2] = value
    assert modal_form(A, B, C) is None


def test_repeated_eigenvalues_without_coupling_are_fine() -> None:
    A = 0.5 * torch.eye(4, dtype=torch.float64)
    modes = modal_form(A, torch.ones(4, 1), torch.ones(1, 4))
    assert modes.system.order == 4
    assert modes.system.impulse_response(2)[:, 0, 0].tolist() == pytest.approx([4.0, 2.0])


def test_gain_ratio_ignores_states_without_input_or_output() -> None:
    system = random_system(4, 2, 2)
    expected = gain_ratio(DiagonalSystem(system.eigenvalues[:2], system.B[:2], system.C[:, :2]))
    system.B[2], system.C[:, 3] = 0, 0
    assert gain_ratio(system) == pytest.approx(expected)
    assert gain_ratio(DiagonalSystem(system.eigenvalues, 0 * system.B, system.C)) == 1
