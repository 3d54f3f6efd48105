"""Gradients that were accumulated before a cut: they follow as first moments do, and come back when it is undone."""

from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.surgery import Snapshot
from tests.family_table import LRU, MAMBA, Family, by_layout, family_id, same, ssm_layers


HALF = CompreSSMConfig(fraction=0.5)
ROUND_OFF = 1e-5  # float32 gradients, summed in another order


def with_gradients(family: Family, model: Any = None) -> Any:
    model = model or family.build()
    model(**family.batch()).loss.backward()
    return model


@pytest.mark.parametrize("family", by_layout(), ids=family_id)
def test_no_gradient_vanishes_and_none_appears(family: Family) -> None:
    model = with_gradients(family)
    inside = {id(parameter) for layer in ssm_layers(model).values() for parameter in layer.parameters()}
    next(parameter for parameter in model.parameters() if id(parameter) not in inside).grad = None
    had = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    compress(model, HALF, family.calibration())
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == had
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("family", by_layout(), ids=family_id)
def test_gradients_follow_as_the_first_moments_do(family: Family) -> None:
    """After one step of SGD with momentum, each moment is the gradient that it was made from."""
    model = with_gradients(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer.step()
    compress(model, HALF, family.calibration(), optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, optimizer.state[parameter]["momentum_buffer"]), name


def test_a_carried_gradient_is_that_of_the_smaller_model_where_the_cut_is_exact() -> None:
    """Half of the states get no input and are not read out, so that dropping them changes nothing."""
    model = MAMBA.build()
    with torch.no_grad():
        for layer in ssm_layers(model).values():
            for start in (2, 10):  # rows of B and of C, after those of the step
                layer.x_proj.weight[start + 4 : start + 8] = 0
    with_gradients(MAMBA, model)
    compress(model, HALF, MAMBA.calibration())
    carried = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with_gradients(MAMBA, model)
    for name, parameter in model.named_parameters():
        assert (carried[name] - parameter.grad).abs().max() < ROUND_OFF * max(1, parameter.grad.abs().max()), name


def test_a_source_without_a_gradient_counts_as_zero() -> None:
    model = with_gradients(LRU)
    layer = next(iter(ssm_layers(model).values()))
    layer.B_im.grad = None
    layer.C_re.grad = layer.C_im.grad = None
    compress(model, HALF)
    assert layer.B_re.grad.shape == layer.B_re.shape
    assert layer.B_im.grad.shape == layer.B_im.shape  # the real part's gradient turns into it
    assert layer.C_re.grad is None
    assert layer.C_im.grad is None


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the parameter's dtype")
def test_gradients_in_another_dtype_stay_in_it() -> None:
    model = LRU.build(torch.bfloat16)
    layer = next(iter(ssm_layers(model).values()))
    layer.C_re.grad_dtype = torch.float32
    layer.C_re.grad = torch.ones(layer.C_re.shape)
    compress(model, HALF)
    assert layer.C_re.grad.dtype == torch.float32
    layer.C_re.grad.add_(1)


def test_gradients_come_back_with_the_parameters() -> None:
    model = with_gradients(MAMBA)
    before = {name: (parameter, parameter.grad.clone()) for name, parameter in model.named_parameters()}
    saved = Snapshot(model)
    compress(model, HALF, MAMBA.calibration())
    saved.restore()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert same(parameter.grad, before[name][1])


def test_a_cut_amid_accumulation_steps_with_all_of_the_gradient() -> None:
    """Half the batch before the cut and half after it, as the smaller model sees the whole where the cut is exact."""
    model = MAMBA.build()
    with torch.no_grad():
        for layer in ssm_layers(model).values():
            for start in (2, 10):
                layer.x_proj.weight[start + 4 : start + 8] = 0
    halves = [MAMBA.batch(2, seed=seed) for seed in (3, 4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**halves[0]).loss.backward()
    compress(model, HALF, MAMBA.calibration(), optimizer)
    model(**halves[1]).loss.backward()
    accumulated = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    for half in halves:
        model(**half).loss.backward()
    for name, parameter in model.named_parameters():
        assert (accumulated[name] - parameter.grad).abs().max() < ROUND_OFF * max(1, parameter.grad.abs().max()), name
