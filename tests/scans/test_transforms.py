"""The fast scans inside the transforms of `torch.func`: they give way to code that can be transformed."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compressm.models import LRUConfig, LRUForCausalLM, S5Config, S5ForCausalLM
from hf_compressm.scans import (
    diagonal_scan,
    diagonal_scan_reference,
    disable_fast_selective_scan,
    enable_fast_selective_scan,
    selective_scan,
    selective_scan_reference,
    ssd_scan,
    ssd_scan_reference,
)
from hf_compressm.scans.boundary import has_kernel
from hf_compressm.scans.transforms import is_transformed
from tests.stock_configs import stock_settings


ROUND_OFF = 1e-10  # float64
SINGLE_ROUND_OFF = 1e-5  # float32, relative to the largest entry
LENGTH = 70  # more than a chunk of every scan


def random(*shape, complex_values=False):
    return torch.randn(*shape, dtype=torch.complex128 if complex_values else torch.float64)


def diagonal_case():
    eigenvalues = torch.polar(torch.full((5,), 0.9, dtype=torch.float64), random(5))
    B, C = random(5, 3, complex_values=True), random(2, 5, complex_values=True)
    return diagonal_scan, diagonal_scan_reference, random(2, LENGTH, 3), (eigenvalues, B, C)


def selective_case():
    others = random(2, 4, LENGTH), -random(4, 3).exp(), random(2, 3, LENGTH), random(2, 3, LENGTH)
    return selective_scan, selective_scan_reference, random(2, 4, LENGTH), others


def ssd_case():
    others = random(2, LENGTH, 4), -random(4).exp(), random(2, LENGTH, 2, 3), random(2, LENGTH, 2, 3)
    return ssd_scan, ssd_scan_reference, random(2, LENGTH, 4, 2), others


CASES = {"diagonal": diagonal_case, "selective": selective_case, "ssd": ssd_case}


def assert_close(actual, expected, tolerance=ROUND_OFF):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_outside_of_transforms(case):
    scan, reference, u, others = CASES[case]()
    direction = torch.randn_like(u)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(scan(forward_ad.make_dual(u, direction), *others)).tangent
    assert_close(found, jvp(lambda u: reference(u, *others), (u,), (direction,))[1])


@pytest.mark.parametrize("case", CASES)
def test_grad_of_every_argument(case):
    scan, reference, u, others = CASES[case]()
    positions = tuple(range(1 + len(others)))
    actual = grad(lambda *given: scan(*given).square().sum(), positions)(u, *others)
    given = [tensor.clone().requires_grad_() for tensor in (u, *others)]
    expected = torch.autograd.grad(reference(*given).square().sum(), given)
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("case", CASES)
def test_vmap_over_the_input(case):
    scan, reference, u, others = CASES[case]()
    stacked = torch.stack([u, 2 * u, -u])
    expected = torch.stack([reference(each, *others) for each in stacked])
    assert_close(vmap(lambda each: scan(each, *others))(stacked), expected)


@pytest.mark.parametrize("case", CASES)
def test_vmap_over_the_system(case):
    scan, reference, u, others = CASES[case]()
    stacked = [torch.stack([other, 0.5 * other]) for other in others]
    expected = torch.stack([reference(u, *each) for each in zip(*stacked, strict=True)])
    assert_close(vmap(lambda *each: scan(u, *each))(*stacked), expected)


@pytest.mark.parametrize("case", CASES)
def test_forward_mode(case):
    scan, reference, u, others = CASES[case]()
    direction = torch.randn_like(u)
    out, tangent = jvp(lambda given: scan(given, *others), (u,), (direction,))
    assert_close(out, reference(u, *others))
    assert_close(tangent, reference(direction, *others))  # all three are linear in their input


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_gradients(case):
    scan, reference, u, others = CASES[case]()
    short = u.narrow(2 if case == "selective" else 1, 0, 3)
    if case != "diagonal":
        dim = 2 if case == "selective" else 1
        others = tuple(x.narrow(dim, 0, 3) if x.dim() > 2 else x for x in others)
    actual = hessian(lambda given: scan(given, *others).pow(3).sum())(short)
    expected = torch.autograd.functional.hessian(lambda given: reference(given, *others).pow(3).sum(), short)
    assert_close(actual, expected)
    assert_close(jacrev(lambda given: scan(given, *others))(short), jacrev(lambda g: reference(g, *others))(short))


def test_packed_texts_stay_apart():
    _, _, u, others = ssd_case()
    seq_idx = (torch.arange(LENGTH) >= 33).long().expand(2, -1)
    actual = grad(lambda given: ssd_scan(given, *others, seq_idx=seq_idx)[:, 33:].sum())(u)
    assert not actual[:, :33].any()
    assert actual[:, 33:].any()


def test_no_kernel_is_tried_there(monkeypatch):
    monkeypatch.setattr("hf_compressm.scans.boundary.working_kernel", lambda trial, device, dtype: object())
    seen = []
    grad(lambda x: seen.append((is_transformed(), has_kernel(x.device, torch.complex64))) or x.sum())(torch.ones(2))
    assert seen == [(True, False)]
    assert not is_transformed()
    assert has_kernel(torch.device("cpu"), torch.complex64)


OWN = {
    "s5": (S5ForCausalLM, S5Config),
    "lru": (LRUForCausalLM, LRUConfig),
}


def make_model(name):
    if name in OWN:
        model_class, config_class = OWN[name]
        return model_class(config_class(vocab_size=40, hidden_size=6, state_size=8, num_hidden_layers=2)).eval()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **stock_settings(name, 5))).eval()


@pytest.fixture
def fast():
    enable_fast_selective_scan()
    yield
    disable_fast_selective_scan()


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@pytest.mark.parametrize("name", [*OWN, "mamba", "mamba2"])
def test_gradients_per_example_of_a_model(name, fast):
    model = make_model(name)
    tokens = torch.randint(2, 40, (3, 11))
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters, row):
        options = {"labels": row[None], "use_cache": False}
        return functional_call(model, parameters, (row[None],), options, tie_weights=True).loss

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens)
    for index, row in enumerate(tokens):
        model.zero_grad()
        model(row[None], labels=row[None], use_cache=False).loss.backward()
        for key, parameter in model.named_parameters():
            scale = max(1e-3, parameter.grad.abs().max().item())
            assert (actual[key][index] - parameter.grad).abs().max() <= SINGLE_ROUND_OFF * scale, key
