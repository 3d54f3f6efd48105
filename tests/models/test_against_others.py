import numpy as np
import pytest
import torch
from s5.s5_model import S5, discretize_bilinear  # a test extra; without it this file must fail, not be skipped
from torch.testing import assert_close

from tests.models.cases import LRU
from tests.models.oracles import lru_layer_from_reference, s5_layer_from_s5_pytorch


TOLERANCE = 1e-10  # float64, both sides


@pytest.fixture(autouse=True)
def oracle_in_double_precision(monkeypatch):
    """s5-pytorch rounds B to complex64 on its way, and with it its gradient; the rest follows its parameters."""
    monkeypatch.setattr("s5.s5_model.as_complex", torch.view_as_complex)


def double_s5_pytorch(discretization: str, bidir: bool) -> S5:
    """An s5-pytorch layer in float64 and complex128; `Module.to(float64)` would drop imaginary parts."""
    module = S5(5, 12, block_count=2, bidir=bidir)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.complex128 if parameter.is_complex() else torch.float64)
    if discretization == "bilinear":
        module.seq.discretize = discretize_bilinear
    return module


@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_s5_equals_s5_pytorch_in_outputs_and_gradients(discretization, bidir):
    theirs = double_s5_pytorch(discretization, bidir)
    ours = s5_layer_from_s5_pytorch(theirs)
    assert ours.discretization == discretization
    their_u = torch.randn(2, 17, 5, dtype=torch.float64, requires_grad=True)
    our_u = their_u.detach().clone().requires_grad_()
    expected, outputs = theirs(their_u), ours(our_u)
    assert_close(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE)

    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (outputs * weights).sum().backward()
    ssm = theirs.seq
    expected_gradients = {
        "Lambda_re": ssm.Lambda.grad.real,
        "Lambda_im": ssm.Lambda.grad.imag,
        "B_re": ssm.B.grad[..., 0],
        "B_im": ssm.B.grad[..., 1],
        "C_re": ssm.C.grad.real,
        "C_im": ssm.C.grad.imag,
        "D": ssm.D.grad,
        "log_step": ssm.log_step.grad,
    }
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    assert_close(our_u.grad, their_u.grad, rtol=TOLERANCE, atol=TOLERANCE)


def test_s5_states_equal_those_of_s5_pytorch():
    theirs = double_s5_pytorch("zoh", False)
    ours, u = s5_layer_from_s5_pytorch(theirs.seq), torch.randn(2, 9, 5, dtype=torch.float64)
    _, expected = theirs(u, return_state=True)
    _, state = ours(u, return_last_state=True)
    assert_close(state, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_lru_from_reference_parameters():
    layer = LRU.layer().double()
    params = {name: parameter.detach().numpy().copy() for name, parameter in layer.named_parameters()}
    with np.errstate(divide="ignore"):
        params["theta"][0] = 0.0
        params["theta_log"] = np.log(params.pop("theta"))  # -inf where the angle is 0
    converted = lru_layer_from_reference(params)
    assert converted.theta[0] == 0
    with torch.no_grad():
        layer.theta[0] = 0.0
    u = torch.randn(2, 9, 6, dtype=torch.float64)
    assert_close(converted(u), layer(u), rtol=TOLERANCE, atol=TOLERANCE)
