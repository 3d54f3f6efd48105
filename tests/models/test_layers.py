import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_compressm.models import S5Config, S5Layer
from hf_compressm.models.hippo import hippo_normal_blocks, hippo_normal_eigensystem
from hf_compressm.models.modeling_s5 import discretize, expm1_ratio
from tests.models.cases import FAMILIES, LRU, S5


# The scan sums in another order than the recurrence; float64 and a dozen steps lose no more than this.
TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-5
# bfloat16 input and output carry eight bits.
BFLOAT16_TOLERANCE = 2e-2

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def recurrence(layer, u, initial_state=None):
    """The definition, step by step, from `system()` alone."""
    eigenvalues, B, C = layer.system(torch.float64)
    state = torch.zeros(len(u), layer.slots, dtype=B.dtype) if initial_state is None else initial_state
    outputs = []
    for step in u.unbind(1):
        state = eigenvalues * state + step.to(B.dtype) @ B.mT
        outputs.append((state @ C.mT).real + layer.D.double() * step)
    return torch.stack(outputs, dim=1), state


@families
def test_layer_computes_the_recurrence_of_its_system(family):
    layer, u = family.layer().double(), torch.randn(2, 13, 6, dtype=torch.float64)
    outputs, state = layer(u, return_last_state=True)
    expected, expected_state = recurrence(layer, u)
    assert_close(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close(state, expected_state, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close(layer(u), outputs, rtol=TOLERANCE, atol=TOLERANCE)


@families
def test_a_sequence_in_two_parts_equals_the_whole(family):
    layer, u = family.layer().double(), torch.randn(2, 13, 6, dtype=torch.float64)
    first, state = layer(u[:, :5], return_last_state=True)
    second = layer(u[:, 5:], initial_state=state)
    assert_close(torch.cat([first, second], dim=1), layer(u), rtol=TOLERANCE, atol=TOLERANCE)


@families
def test_system_has_the_documented_shapes_and_types(family):
    layer = family.layer()
    for dtype, complex_dtype in ((torch.float32, torch.complex64), (torch.float64, torch.complex128)):
        eigenvalues, B, C = layer.system(dtype)
        assert eigenvalues.shape == (layer.slots,)
        assert B.shape == (layer.slots, 6)
        assert C.shape == (6, layer.slots)
        assert {eigenvalues.dtype, B.dtype, C.dtype} == {complex_dtype}
        assert (eigenvalues.abs() < 1).all()
    assert layer.state_size == family.config().state_size
    assert not any(parameter.is_complex() for parameter in layer.parameters())
    assert f"state_size={layer.state_size}" in repr(layer)


@families
@pytest.mark.parametrize("state_size", [2, 14])
def test_smallest_and_odd_sizes_run(family, state_size):
    layer = family.layer(state_size=state_size, hidden_size=1)
    assert layer(torch.randn(1, 1, 1)).shape == (1, 1, 1)


def test_a_single_state_runs():
    assert LRU.layer(state_size=1)(torch.randn(2, 5, 6)).isfinite().all()
    assert S5.layer(state_size=1, conj_sym=False)(torch.randn(2, 5, 6)).isfinite().all()


@families
def test_bfloat16_computes_states_in_float32(family):
    layer, u = family.layer(), torch.randn(2, 13, 6)
    layer.to(torch.bfloat16)
    outputs, state = layer(u.bfloat16(), return_last_state=True)
    assert outputs.dtype is torch.bfloat16
    assert state.dtype is torch.complex64
    expected, _ = recurrence(layer, u.bfloat16().double())
    assert_close(outputs.double(), expected, rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE)


@families
def test_autocast_does_not_reach_the_recurrence(family):
    layer, u = family.layer(), torch.randn(2, 13, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = layer(u)
    assert_close(outputs, layer(u), rtol=0, atol=0)


@families
def test_gradients_pass_gradcheck(family):
    layer, u = family.layer(hidden_size=2, state_size=4).double(), torch.randn(1, 5, 2, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(u, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), u)

    assert torch.autograd.gradcheck(run, (u.requires_grad_(), *values))


def test_bidirectional_reads_states_of_both_directions():
    layer, u = S5.layer(bidirectional=True).double(), torch.randn(2, 13, 6, dtype=torch.float64)
    eigenvalues, B, C = layer.system(torch.float64)
    assert C.shape == (12, layer.slots)

    def one_direction(u, C):
        state, outputs = torch.zeros(len(u), layer.slots, dtype=B.dtype), []
        for step in u.unbind(1):
            state = eigenvalues * state + step.to(B.dtype) @ B.mT
            outputs.append((state @ C.mT).real)
        return torch.stack(outputs, dim=1)

    expected = one_direction(u, C[:6]) + one_direction(u.flip(1), C[6:]).flip(1) + layer.D * u
    assert_close(layer(u), expected, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(ValueError, match="whole sequences"):
        layer(u, return_last_state=True)


def test_conjugate_symmetry_equals_the_layer_with_all_states():
    half, u = S5.layer().double(), torch.randn(2, 13, 6, dtype=torch.float64)
    whole = S5.layer(conj_sym=False).double()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            stored = getattr(half, name)
            sign = -1 if name.endswith("_im") else 1
            if name != "D":
                stored = torch.cat([stored, sign * stored], dim=1 if name.startswith("C_") else 0)
            parameter.copy_(stored)
    assert_close(half(u), whole(u), rtol=TOLERANCE, atol=TOLERANCE)


def test_clip_eigs_bounds_the_real_part():
    layer = S5.layer(clip_eigs=True)
    with torch.no_grad():
        layer.Lambda_re.fill_(0.5)
    assert (layer.system()[0].abs() < 1).all()
    layer.clip_eigs = False
    assert (layer.system()[0].abs() > 1).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_expm1_ratio_is_accurate_from_zero_to_large(dtype):
    moduli = np.concatenate([[0.0], np.logspace(-12, 2.5, 60)])
    z = torch.from_numpy(np.outer(moduli, np.exp(1j * np.linspace(np.pi / 2, 3 * np.pi / 2, 9))).ravel()).to(dtype)
    exact = z.to(torch.complex128).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        # expm1(a + ib) without cancellation: expm1(a) - 2 exp(a) sin(b/2)^2 + i exp(a) sin(b)
        expm1 = np.expm1(exact.real) - 2 * np.exp(exact.real) * np.sin(exact.imag / 2) ** 2
        expected = (expm1 + 1j * np.exp(exact.real) * np.sin(exact.imag)) / exact
    expected[exact == 0] = 1
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(expm1_ratio(z).to(torch.complex128), torch.from_numpy(expected), rtol=tolerance, atol=tolerance)


def test_zoh_and_its_gradients_survive_an_eigenvalue_at_zero():
    Lambda = torch.tensor([0, 1e-9, 1e-4j, -1e4 + 3j], dtype=torch.complex64).requires_grad_()
    B, Delta = torch.ones(4, 1, dtype=torch.complex64), torch.full((4,), 0.1).requires_grad_()
    Lambda_bar, B_bar = discretize(Lambda, B, Delta, "zoh")
    (Lambda_bar.abs().sum() + B_bar.real.sum()).backward()
    assert_close(B_bar[0, 0].item(), 0.1 + 0j)
    assert Lambda.grad.isfinite().all()
    assert Delta.grad.isfinite().all()
    # d B_bar / d Lambda = Delta^2 / 2 at 0, and d|Lambda_bar| adds Delta
    assert_close(Lambda.grad[:2].real, torch.full((2,), 0.1 + 0.005), rtol=FLOAT32_TOLERANCE, atol=0)


def test_hippo_normal_has_the_spectrum_of_the_matrix():
    size = 12
    Lambda, V = hippo_normal_eigensystem(size)
    index = np.arange(size)
    A = np.array([[-math.sqrt((2 * n + 1) * (2 * k + 1)) / 2 * np.sign(n - k) for k in index] for n in index])
    A -= 0.5 * np.eye(size)  # HiPPO-LegS plus its rank-one correction, written out
    np.testing.assert_allclose(V @ np.diag(Lambda) @ V.conj().T, A, atol=1e-12)
    np.testing.assert_allclose(V.conj().T @ V, np.eye(size), atol=1e-12)


def test_hippo_blocks_are_those_of_the_reference_and_uneven_sizes_are_spread():
    Lambda, blocks = hippo_normal_blocks(slots=6, num_blocks=3, conj_sym=True)
    np.testing.assert_allclose(Lambda, np.tile(hippo_normal_eigensystem(4)[0][:2], 3))
    assert [block.shape for block in blocks] == [(4, 2)] * 3
    assert (Lambda.imag < 0).all()
    assert [block.shape[1] for block in hippo_normal_blocks(7, 3, False)[1]] == [3, 2, 2]
    assert len(hippo_normal_blocks(2, 8, True)[1]) == 2


def test_s5_initialisation_has_the_distributions_of_the_reference():
    config = S5Config(hidden_size=400, state_size=64, num_blocks=4, dt_min=0.01, dt_max=0.2)
    layer = S5Layer(config)
    assert_close(layer.Lambda_re.detach(), torch.full((32,), -0.5))
    assert layer.log_step.min() >= math.log(0.01)
    assert layer.log_step.max() <= math.log(0.2)
    # V has orthonormal columns, so each of C's parts has variance 1/64 and |B|^2 has mean 1/64
    assert_close(layer.C_re.var().item(), 1 / 64, rtol=0.05, atol=0)
    assert_close((layer.B_re**2 + layer.B_im**2).mean().item(), 1 / 64, rtol=0.05, atol=0)
    assert_close(layer.D.std().item(), 1.0, rtol=0.1, atol=0)


def test_lru_initialisation_is_the_ring_with_normalised_inputs():
    layer = LRU.layer(state_size=2000, hidden_size=3, r_min=0.4, r_max=0.8, max_phase=1.5)
    eigenvalues, B, _ = layer.system(torch.float64)
    squared = eigenvalues.detach().abs() ** 2
    assert 0.16 - 1e-6 <= squared.min() <= squared.max() <= 0.64 + 1e-6
    assert_close(squared.mean().item(), 0.4, rtol=0.03, atol=0)  # uniform in area
    assert 0 <= layer.theta.min() <= layer.theta.max() <= 1.5
    assert_close(layer.gamma_log.double().exp(), (1 - squared).sqrt(), rtol=1e-5, atol=0)
    assert_close(B.abs().square().mean().item(), (1 - squared).mean().item() / 3, rtol=0.1, atol=0)


def test_lru_starts_finite_at_the_ends_of_the_unit_disc():
    layer = LRU.layer(state_size=500, r_min=0.0, r_max=1.0)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_lru_equals_the_reference_recurrence_in_numpy():
    layer, u = LRU.layer().double(), np.random.default_rng(0).normal(size=(2, 15, 6))
    with torch.no_grad():
        layer.theta[0] = 0.0  # a real eigenvalue
    p = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    eigenvalues = np.exp(-np.exp(p["nu_log"]) + 1j * p["theta"])
    B = (p["B_re"] + 1j * p["B_im"]) * np.exp(p["gamma_log"])[:, None]
    C = p["C_re"] + 1j * p["C_im"]
    expected = np.empty_like(u)
    for sequence, outputs in zip(u, expected, strict=True):
        state = np.zeros(8, dtype=complex)
        for k, step in enumerate(sequence):
            state = eigenvalues * state + B @ step
            outputs[k] = (C @ state).real + p["D"] * step
    assert_close(layer(torch.from_numpy(u)).detach().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)
