import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_compressm.numerics import DiagonalSystem, gramians, h2_norm, relative_h2_error
from tests.numerics.systems import (
    ALL,
    EPS,
    NEAR_UNIT,
    REALIZATIONS,
    REGULAR,
    SILENT,
    conditioning,
    dense_real,
    random_system,
)


ORACLE = 1e-9
"""Relative to the largest entry: scipy's bilinear transform loses about (1 - |lambda|)^-2 rounding errors."""
PER_CONDITION = 8
"""Rounding errors of a product, a difference and a quotient in units of `eps / (1 - |lambda|)`."""
TAIL = 1e-10
"""0.95^(2 * 400) is 1e-18; what remains is the round-off of four hundred additions."""


@pytest.mark.parametrize("system", (REGULAR | SILENT).values(), ids=REGULAR | SILENT)
def test_complex_gramians_solve_the_stein_equations(system: DiagonalSystem) -> None:
    P, Q = (x.numpy() for x in gramians(system, "complex"))
    A, B, C = np.diag(system.eigenvalues.numpy()), system.B.numpy(), system.C.numpy()
    assert_close(P, scipy.linalg.solve_discrete_lyapunov(A, B @ B.conj().T))
    assert_close(Q, scipy.linalg.solve_discrete_lyapunov(A.conj().T, C.conj().T @ C))


@pytest.mark.parametrize("system", (REGULAR | SILENT).values(), ids=REGULAR | SILENT)
def test_real_gramians_solve_the_stein_equations(system: DiagonalSystem) -> None:
    P, Q = gramians(system, "real")
    assert P.dtype == Q.dtype == torch.float64
    A, B, C = dense_real(system)
    # The package's coordinates are sqrt(2) times those of `dense_real`.
    assert_close(P.numpy(), 2 * scipy.linalg.solve_discrete_lyapunov(A, B @ B.T))
    assert_close(Q.numpy(), scipy.linalg.solve_discrete_lyapunov(A.T, C.T @ C) / 2)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=ORACLE * np.abs(expected).max(initial=0))


@pytest.mark.parametrize("realization", REALIZATIONS)
@pytest.mark.parametrize("system", ALL.values(), ids=ALL)
def test_gramians_are_finite_and_positive_semidefinite(system: DiagonalSystem, realization: str) -> None:
    for gramian in gramians(system, realization):
        assert bool(torch.isfinite(gramian.abs()).all())
        values = torch.linalg.eigvalsh(gramian)
        slack = PER_CONDITION * system.order * (EPS + conditioning(system)) * float(values[-1])
        assert float(values[0]) >= -slack
        assert float((gramian - gramian.mH).abs().max()) <= slack


@pytest.mark.parametrize("modulus", [0.0, 0.5, 0.9999, NEAR_UNIT])
def test_one_real_state_has_the_exact_gramian(modulus: float) -> None:
    system = DiagonalSystem(
        torch.tensor([modulus], dtype=torch.float64), torch.full((1, 1), 3.0), torch.full((1, 1), 2.0)
    )
    P, Q = gramians(system, "complex")
    exact = 1 / float(1 - Fraction(modulus) ** 2)
    tolerance = PER_CONDITION * conditioning(system)
    assert P.item().real == pytest.approx(9 * exact, rel=tolerance)
    assert Q.item().real == pytest.approx(4 * exact, rel=tolerance)


@pytest.mark.parametrize("name", ["one state", "odd order", "wide", "tall", "real", "zero eigenvalue", "repeated"])
def test_h2_norm_is_the_energy_of_the_impulse_response(name: str) -> None:
    system = REGULAR[name]
    assert h2_norm(system) == pytest.approx(float(system.impulse_response(400).norm()), rel=TAIL)


@pytest.mark.parametrize("system", SILENT.values(), ids=SILENT)
def test_h2_norm_of_a_silent_system_is_zero(system: DiagonalSystem) -> None:
    assert h2_norm(system) == 0


def test_h2_norm_of_the_difference_with_itself_is_round_off() -> None:
    system = random_system(9, 2, 2)
    # The square root of a cancelled sum of order one keeps half of the digits.
    assert h2_norm(system - system) <= 1e3 * math.sqrt(EPS)


@pytest.mark.parametrize("name", ["one state", "odd order", "wide", "tall", "real", "zero eigenvalue", "repeated"])
def test_the_relative_h2_error_is_that_of_the_impulse_responses(name: str) -> None:
    system = REGULAR[name]
    other = random_system(4, system.B.shape[1], system.C.shape[0], seed=11)
    response = system.impulse_response(400)
    expected = float((response - other.impulse_response(400)).norm() / response.norm())
    assert relative_h2_error(system, other) == pytest.approx(expected, rel=TAIL)
    assert relative_h2_error(system, system) <= 1e3 * math.sqrt(EPS)


def test_a_silent_system_has_no_relative_error() -> None:
    for system in SILENT.values():
        assert relative_h2_error(system, system) == 0


@pytest.mark.parametrize("realization", REALIZATIONS)
@pytest.mark.parametrize("modulus", [1.0, 1.25])
def test_an_unstable_system_is_refused_with_its_modulus(modulus: float, realization: str) -> None:
    eigenvalues = torch.tensor([0.5, 1j * modulus])
    with pytest.raises(ValueError, match=f"the largest is {modulus:g}"):
        gramians(DiagonalSystem(eigenvalues, torch.ones(2, 1), torch.ones(1, 2)), realization)


@pytest.mark.parametrize("part", ["eigenvalues", "B", "C"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(part: str, value: float) -> None:
    system = random_system(4, 2, 3)
    getattr(system, part).view(-1)[1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        gramians(system)


def test_another_realization_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="got 'imaginary'"):
        gramians(random_system(2), "imaginary")
