"""Moments and gradients of complex parameters over a cut: as those of a pair of real ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_compressm.families import ComplexTerm, MomentTerm, ParameterChange, SSMLayer
from hf_compressm.families.family import CutMethod
from hf_compressm.surgery.mapping import carry_gradients, mapped
from hf_compressm.surgery.moments import roles_of, unknown_entry
from hf_compressm.surgery.obstacles import check_layers
from hf_compressm.surgery.optimizer import prepare_optimizer
from hf_compressm.surgery.parameters import prepare_replacements


EXACT = 1e-6
"""Relative; one float32 rounding after a float64 map."""
OLD, NEW = 5, 3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class Holder(nn.Module):
    """One complex matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, OLD, dtype=torch.complex64))


def change_of(model: Holder, term: MomentTerm) -> ParameterChange:
    return ParameterChange("weight", model.weight, torch.randn(4, NEW, dtype=torch.complex128), (term,))


def terms(model: Holder) -> dict[str, MomentTerm]:
    generator = torch.Generator().manual_seed(3)
    return {
        "mixing both parts": ComplexTerm(model.weight, torch.randn(2 * NEW, 2 * OLD, generator=generator).double(), 1),
        "both parts alike": MomentTerm(model.weight, torch.randn(NEW, OLD, generator=generator).double(), -1),
        "selection": MomentTerm(model.weight, torch.tensor([4, 0, 1]), 1),
        "plain number": MomentTerm(model.weight, torch.tensor(0.3).double(), 1),
    }


def as_pairs(term: MomentTerm, value: Tensor, squared: bool) -> Tensor:
    """The same by the textbook, on real and imaginary parts side by side."""
    real = torch.cat([value.real, value.imag], dim=1).double()
    matrix = term.matrix
    if not matrix.is_floating_point():
        matrix = torch.eye(OLD).double()[matrix]
    if matrix.dim() == 0:
        matrix = matrix * torch.eye(OLD).double()
    if not isinstance(term, ComplexTerm):
        matrix = torch.block_diag(matrix, matrix)
    return torch.complex(*(real @ (matrix.square() if squared else matrix).T).chunk(2, dim=1))


@pytest.mark.parametrize("kind", ["mixing both parts", "both parts alike", "selection", "plain number"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_follow_as_those_of_a_pair_of_real_parameters(name: str, kind: str) -> None:
    model = Holder()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        (model.weight * torch.randn(4, OLD, dtype=torch.complex64)).abs().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    term = terms(model)[kind]
    replacements = prepare_replacements(model, [change_of(model, term)])
    old = dict(optimizer.state[model.weight])
    new = prepare_optimizer(optimizer, model, replacements).parts[0].states[replacements[0].new]
    assert new.keys() == old.keys()
    for key in old.keys() - {"step", "mu_product"}:
        squared = roles_of(optimizer)[key] == "second"
        expected = as_pairs(term, old[key], squared)
        assert new[key].dtype == torch.complex64
        assert (new[key] - expected).norm() <= EXACT * expected.norm(), key
        assert expected.norm() > 0
        if squared:
            assert bool((torch.view_as_real(new[key]) >= 0).all())


def test_a_real_parameter_may_hold_complex_numbers_in_its_last_axis() -> None:
    weight = nn.Parameter(torch.randn(OLD, 4, 2))
    matrix = torch.randn(2 * NEW, 2 * OLD).double()
    found = mapped([ComplexTerm(weight, matrix, 0)], lambda source: source.detach())
    twin = nn.Parameter(torch.view_as_complex(weight.detach()))
    expected = mapped([ComplexTerm(twin, matrix, 0)], lambda source: source.detach())
    assert found.shape == (NEW, 4, 2)
    assert torch.equal(found, torch.view_as_real(expected))


def test_gradients_follow_and_stay_complex() -> None:
    model = Holder()
    (model.weight * torch.randn(4, OLD, dtype=torch.complex64)).abs().sum().backward()
    term = terms(model)["mixing both parts"]
    replacements = prepare_replacements(model, [change_of(model, term)])
    carry_gradients(replacements)
    new = replacements[0].new
    assert new.dtype == new.grad.dtype == torch.complex64
    expected = as_pairs(term, model.weight.grad, squared=False)
    assert (new.grad - expected).norm() <= EXACT * expected.norm()


def test_a_conjugated_view_is_a_gradient_too() -> None:
    model = Holder()
    model.weight.grad = torch.randn(4, OLD, dtype=torch.complex64).conj()
    found = mapped([terms(model)["both parts alike"]], lambda source: source.grad)
    expected = as_pairs(terms(model)["both parts alike"], model.weight.grad.resolve_conj(), squared=False)
    assert (found - expected).norm() <= EXACT * expected.norm()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exp_avg_sq", torch.rand(4, OLD)),
        ("exp_avg_sq_row", torch.rand(4, dtype=torch.complex64)),
        ("exp_avg_sq_col", torch.rand(OLD)),
    ],
)
def test_state_without_a_value_for_each_part_is_not_carried(key: str, value: Tensor) -> None:
    model = Holder()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"exp_avg": torch.zeros(4, OLD, dtype=torch.complex64), key: value}
    assert unknown_entry(state, model.weight, roles_of(optimizer)) == key
    assert unknown_entry({"exp_avg": state["exp_avg"]}, model.weight, roles_of(optimizer)) is None


def test_averages_of_complex_numbers_in_a_real_parameter_are_not_carried() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(OLD, 4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    term = ComplexTerm(model.weight, torch.randn(2 * NEW, 2 * OLD).double(), 0)
    replacements = prepare_replacements(
        model, [ParameterChange("weight", model.weight, torch.zeros(NEW, 4, 2), (term,))]
    )
    optimizer.state[model.weight] = {"exp_avg_sq_row": torch.rand(OLD, 4), "exp_avg_sq_col": torch.rand(OLD, 2)}
    assert prepare_optimizer(optimizer, model, replacements).parts[0].states == {}
    optimizer.state[model.weight] = {"exp_avg_sq": torch.rand(OLD, 4, 2)}
    assert prepare_optimizer(optimizer, model, replacements).parts[0].states[replacements[0].new].keys() == {
        "exp_avg_sq"
    }


def test_a_value_that_is_not_finite_is_found() -> None:
    model = Holder()
    change = ParameterChange("weight", model.weight, torch.full((4, NEW), complex(0, float("nan"))), ())
    with pytest.raises(ValueError, match="not finite"):
        prepare_replacements(model, [change])


def test_complex_parameters_are_not_taken_for_quantised_ones() -> None:
    from s5 import S5

    from hf_compressm.families import find_layers

    layer: SSMLayer = find_layers(S5(4, 8))[0]
    check_layers([(layer, CutMethod("hankel"))])
