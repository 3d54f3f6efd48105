"""What the arms of the comparison compute: losses, norms, refinements and rankings against other ways to them."""

import importlib
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from hf_compressm import CompreSSMConfig, LRUConfig, LRUForSequenceClassification, analyze, compress
from hf_compressm.families import CutMethod, collect_statistics, find_layers
from hf_compressm.numerics import DiagonalSystem, hankel_singular_values, relative_h2_error


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "comparison"
STEP = 1e-6
"""Of the central differences, in float64: their error is then near 1e-10."""
DIFFERENCES = 1e-6
"""Relative, between such differences and a gradient."""
EXACT = 1e-10
"""Relative, between two ways of computing the same in float64."""


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the comparison as its scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def random_system(N: int, H: int = 2, P: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    modulus, angle = 0.5 + 0.45 * torch.rand(N, dtype=torch.float64), 3 * torch.rand(N, dtype=torch.float64)
    return torch.polar(modulus, angle), *(torch.randn(n, m, dtype=torch.complex128) for n, m in ((N, H), (P, N)))


def differences(function: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradient with respect to real and imaginary parts, by central differences, as autograd reports it."""
    gradients = []
    for tensor in tensors:
        parts, gradient = torch.view_as_real(tensor), torch.zeros_like(torch.view_as_real(tensor))
        for index in range(parts.numel()):
            value = parts.view(-1)[index].item()
            sides = []
            for sign in (1, -1):
                parts.view(-1)[index] = value + sign * STEP
                sides.append(function(*tensors).item())
            parts.view(-1)[index] = value
            gradient.view(-1)[index] = (sides[0] - sides[1]) / (2 * STEP)
        gradients.append(torch.view_as_complex(gradient))
    return gradients


def test_the_distillation_loss_is_the_divergence_of_the_softened_predictions(part: Any) -> None:
    student, teacher = [[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 0.0]]
    temperature, expected = 2.0, 0.0
    for own, wanted in zip(student, teacher, strict=True):
        p, q = ([math.exp(x / temperature) for x in logits] for logits in (wanted, own))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    loss = part("distillation").distillation_loss
    found = loss(torch.tensor(student), torch.tensor(teacher), torch.tensor([0, 1]), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_a_language_model_is_distilled_where_the_next_token_is_scored(part: Any) -> None:
    loss = part("distillation").distillation_loss
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[1, -100, 3, -100, -100], [-100, -100, -100, -100, 2]])
    scored = [(0, 1), (1, 3)]  # the positions before the labels 3 and 2; nothing predicts the first token
    rows = [torch.stack([logits[i] for i in scored]) for logits in (student, teacher)]
    assert torch.allclose(loss(student, teacher, labels, 3.0), loss(*rows, torch.tensor([0, 0]), 3.0))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"mixing": 1.5}])
def test_a_distillation_that_cannot_be_is_refused(part: Any, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0 and mixing in"):
        part("distillation").DistillationTrainer(teacher=torch.nn.Linear(1, 1), **settings)


@pytest.mark.parametrize("realization", ["real", "complex"])
@pytest.mark.parametrize("N", [1, 5])
def test_the_hankel_norm_is_the_sum_of_the_singular_values_and_its_gradient_that_of_differences(
    part: Any, realization: str, N: int
) -> None:
    norm = part("hankel").hankel_nuclear_norm
    system = tuple(x.requires_grad_() for x in random_system(N))
    value = norm(*system, realization)
    expected = hankel_singular_values(DiagonalSystem(*(x.detach() for x in system)), realization).sum()
    assert value.item() == pytest.approx(float(expected), rel=EXACT)
    value.backward()
    plain = tuple(x.detach().clone() for x in system)
    for own, other in zip(system, differences(lambda *x: norm(*x, realization), plain), strict=True):
        assert torch.allclose(own.grad, other, rtol=DIFFERENCES, atol=DIFFERENCES)


def test_repeated_singular_values_have_a_gradient(part: Any) -> None:
    """Two channels that do not see each other, with the same system each: every HSV comes twice."""
    norm = part("hankel").hankel_nuclear_norm
    eigenvalues, B, C = random_system(2, H=1, P=1)
    whole = (eigenvalues.repeat(2), torch.block_diag(B, B), torch.block_diag(C, C))
    sigma = hankel_singular_values(DiagonalSystem(*whole))
    assert torch.allclose(sigma[::2], sigma[1::2])
    system = tuple(x.clone().requires_grad_() for x in whole)
    norm(*system).backward()
    for own, other in zip(system, differences(norm, tuple(x.clone() for x in whole)), strict=True):
        assert torch.allclose(own.grad, other, rtol=DIFFERENCES, atol=DIFFERENCES)


def test_states_without_output_have_a_finite_gradient(part: Any) -> None:
    norm = part("hankel").hankel_nuclear_norm
    for silent in (slice(0, 2), slice(None)):
        eigenvalues, B, C = random_system(4)
        C[:, silent] = 0
        system = tuple(x.requires_grad_() for x in (eigenvalues, B, C))
        value = norm(*system)
        value.backward()
        assert all(bool(torch.isfinite(x.grad.abs()).all()) for x in system)
    assert value.item() == 0


def test_the_norm_of_a_model_is_that_of_its_layers_and_shrinks_under_its_gradient(part: Any) -> None:
    hankel = part("hankel")
    model = LRUForSequenceClassification(LRUConfig(input_size=1, hidden_size=3, state_size=6, num_hidden_layers=2))
    plan = analyze(model, CompreSSMConfig(criterion="hankel"))
    expected = sum(float(layer.hankel_singular_values.sum()) for layer in plan.layers)
    norm = hankel.norm_of_layers(model)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    norm.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    assert hankel.norm_of_layers(model).item() < norm.item()


def test_the_norm_is_refused_for_selective_layers(part: Any) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=4, state_size=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match="defined for S5 and LRU layers"):
        part("hankel").norm_of_layers(model)


def test_the_h2_product_is_that_of_the_impulse_responses(part: Any) -> None:
    one, other = random_system(3), random_system(5)
    responses = [DiagonalSystem(*system).impulse_response(2000) for system in (one, other)]
    expected = float((responses[0] * responses[1]).sum())
    assert float(part("refinement").h2_product(one, other)) == pytest.approx(expected, rel=1e-9)


def test_a_refinement_lowers_the_error_that_it_reports(part: Any) -> None:
    model = LRUForSequenceClassification(LRUConfig(input_size=1, hidden_size=3, state_size=16, num_hidden_layers=1))
    layer = model.backbone.layers[0].ssm
    with torch.no_grad():
        wanted = tuple(x.clone() for x in layer.system(torch.float64))
    compress(model, CompreSSMConfig(target_state_size=4, criterion="hankel"))
    before, after = part("refinement").refine(layer, wanted, iterations=30)
    with torch.no_grad():
        found = relative_h2_error(DiagonalSystem(*wanted), DiagonalSystem(*layer.system(torch.float64)))
    assert after < before
    assert found == pytest.approx(after, rel=1e-4)  # parameters are float32


def test_the_energy_arm_keeps_the_states_with_the_most_energy_and_repairs_nothing(part: Any) -> None:
    energy = part("energy")
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=6, num_hidden_layers=1))
    batch = {"input_ids": torch.randint(0, 8, (4, 12))}
    (layer,) = find_layers(model)
    seen = collect_statistics(model, [layer], [CutMethod("interpolative")], [batch])[0]
    energies = (seen.mean("P").diagonal(dim1=1, dim2=2) * seen.mean("Q").diagonal(dim1=1, dim2=2))[0]
    best = energies.argsort(descending=True)[:3].sort().values
    A, rows = layer.module.A_log.clone(), layer.module.x_proj.weight.clone()
    with energy.ranking_by_energy(model):
        compress(model, CompreSSMConfig(target_state_size=3), [batch])
    assert torch.equal(layer.module.A_log, A[:, best])
    assert torch.equal(layer.module.x_proj.weight[-3:], rows[-6:][best])
    assert type(find_layers(model)[0].family) is not energy.EnergyFamily


def test_recall_asks_for_the_values_of_keys_that_were_shown(part: Any) -> None:
    examples = part("recall").recall_examples(count=20, keys=4, values=5, shown=9, seed=0)
    for tokens, labels in zip(examples["input_ids"].tolist(), examples["labels"].tolist(), strict=True):
        value_of: dict[int, int] = {}
        for key, value, unscored, label in zip(tokens[::2], tokens[1::2], labels[::2], labels[1::2], strict=True):
            assert 0 <= key < 4 <= value < 9
            assert (unscored, label) == (-100, value if key in value_of else -100)
            assert value_of.setdefault(key, value) == value


def test_training_sequences_of_recall_have_fewer_keys(part: Any) -> None:
    draw = part("recall").recall_examples
    keys = draw(count=200, keys=6, values=3, shown=60, seed=0, fewest=2)["input_ids"][:, ::2]
    assert {len(set(row)) for row in keys.tolist()} == {2, 3, 4, 5, 6}
    with pytest.raises(ValueError, match="fewest <= keys"):
        draw(count=1, keys=2, values=3, shown=4, seed=0, fewest=3)


def test_a_ranking_has_settled_where_it_stays_above(part: Any) -> None:
    rankings = part("rankings")
    points = [{"share": s, "correlation": c} for s, c in ((0.25, 0.95), (0.5, 0.7), (0.75, 0.92), (1.0, 1.0))]
    assert [rankings.settled_at(points, level) for level in (0.6, 0.9, 0.95)] == [0.25, 0.75, 1.0]
    assert rankings.overlap(list(range(16)), [0.0, *range(14), 20.0]) == 1.0
    assert rankings.overlap(list(range(16)), list(range(16, 0, -1))) == 0.0


def test_scored_positions_alone_count(part: Any) -> None:
    task: ModuleType = part("tasks")
    seen = SimpleNamespace(predictions=torch.tensor([[1, 2, 3, 4]]).numpy(), label_ids=[[9, -100, 2, 5]])
    made = task.Task("", None, None, None, {}, None, "accuracy")
    assert made.metrics(seen) == {"accuracy": 0.5}
