"""S5 and LRU cuts: the function that comes out, its error, and exact gradient maps."""

import pytest
import torch
from torch import Tensor

from hf_compressm import CompreSSMConfig, compress, plan_compression
from hf_compressm.families import SSMLayer, find_layers
from hf_compressm.families.linear import _fill
from hf_compressm.numerics import DiagonalSystem, balance, truncate
from hf_compressm.numerics.balancing import _project
from tests.families.measuring import run
from tests.family_table import LINEAR, S5_CLASSIFIER, Family, ssm_layers


EXACT = 1e-6
"""Relative; two ways through the parametrisation in float64."""
GRADIENT = 1e-8
VARIANTS = [
    ("", {}),
    ("bilinear", {"discretization": "bilinear"}),
    ("clipped", {"clip_eigs": True}),
    ("clipped bilinear", {"clip_eigs": True, "discretization": "bilinear"}),
]
ROWS = [(family, variant) for family in LINEAR for _, variant in (VARIANTS if family.family == "s5" else VARIANTS[:1])]
every_row = pytest.mark.parametrize(
    ("family", "variant"),
    ROWS,
    ids=[f"{family.name} {' '.join(map(str, variant.values()))}" for family, variant in ROWS],
)


def system(module: torch.nn.Module) -> DiagonalSystem:
    with torch.no_grad():
        return DiagonalSystem(*module.system(torch.float64))


def built(family: Family, variant: dict, **kwargs: object) -> tuple[torch.nn.Module, SSMLayer]:
    model = family.build(torch.float64, **variant, **kwargs)
    return model, find_layers(model)[0]


@every_row
@pytest.mark.parametrize("realization", ["real", "complex"])
@pytest.mark.parametrize("size", [2, 6, 10])
def test_a_cut_layer_computes_the_reduced_system(family: Family, variant: dict, realization: str, size: int) -> None:
    model, layer = built(family, variant, state_size=16)
    full = system(layer.module)
    expected = truncate(balance(full, realization), size * full.order // 16)
    result = compress(model, CompreSSMConfig(target_state_size=size, realization=realization))
    found, wanted = system(layer.module).impulse_response(60), expected.system.impulse_response(60)
    assert (found - wanted).norm() <= EXACT * wanted.norm()
    entry = result.plan.layers[0]
    factor = 2**0.5 if layer.module.bidirectional else 1.0
    assert entry.error_bound == pytest.approx(factor * expected.error_bound)
    frequencies = torch.linspace(0, torch.pi, 400, dtype=torch.float64)
    error = (full - system(layer.module)).frequency_response(frequencies)
    if layer.module.bidirectional:
        forward, backward = error.chunk(2, dim=1)
        error = forward + backward.conj()
    assert float(torch.linalg.matrix_norm(error, ord=2).max()) <= entry.error_bound * (1 + 1e-9) + 1e-9


@every_row
def test_the_predicted_error_is_that_on_white_input(family: Family, variant: dict) -> None:
    model, layer = built(family, variant, state_size=16)
    white = torch.randn(8, 3000, 6, dtype=torch.float64)
    feed_through = layer.module.D.detach() * white
    with torch.no_grad():
        before = layer.module(white) - feed_through
        entry = compress(model, CompreSSMConfig(target_state_size=8)).plan.layers[0]
        after = layer.module(white) - feed_through
    measured = float((after - before).norm() / before.norm())
    assert measured == pytest.approx(entry.predicted_error, rel=0.2)


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_empirical_cut_is_predicted_on_its_own_data(family: Family, variant: dict, dtype: torch.dtype) -> None:
    model = family.build(dtype, **variant, state_size=16)
    config = CompreSSMConfig(target_state_size=8, criterion="empirical")
    for entry in compress(model, config, family.calibration(4, dtype)).plan.layers:
        assert entry.criterion == "empirical"
        assert 0 <= entry.predicted_error < 1
        assert (entry.error_bound is None) or "closed-form" in entry.reason


@every_row
def test_under_autocast_the_measured_covariance_keeps_its_precision(family: Family, variant: dict) -> None:
    model = family.build(**variant)
    config = CompreSSMConfig(fraction=0.5, criterion="empirical")
    calibration = [family.batch()]
    layer = next(iter(ssm_layers(model).values()))
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        plan = plan_compression(model, config, calibration)
    hook.remove()
    statistics = run(layer, "empirical", (inputs[0], {}))
    expected = balance(system(layer), "real", statistics.mean("covariance")).hankel_singular_values
    torch.testing.assert_close(plan.layers[0].hankel_singular_values, expected, rtol=1e-6, atol=1e-9)


@every_row
def test_mapped_gradients_of_B_and_C_are_autograds_under_a_full_change_of_basis(family: Family, variant: dict) -> None:
    """Projecting on all balanced states is a similarity, so that gradients map exactly."""
    _, layer = built(family, variant, state_size=8)
    module, adapter = layer.module, layer.family
    if not any(module.named_buffers()):  # keep every state well reachable, so that the similarity is well conditioned
        with torch.no_grad():
            for name in ("B_re", "B_im", "C_re", "C_im"):
                parameter = getattr(module, name)
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    full = adapter.system(module)
    balancing = balance(full, "complex")
    truncation = _project(balancing, torch.arange(full.order))
    assert truncation is not None
    assert truncation.system.order == full.order
    changes = adapter._changes(layer, _fill(full, truncation, full.order))
    u = torch.randn(2, 40, 6, dtype=torch.float64)
    target = torch.randn(2, 40, 6, dtype=torch.float64)

    def gradients() -> dict[str, Tensor]:
        module.zero_grad()
        loss = (module(u) * target).sum()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    old = gradients()
    by_parameter = {id(parameter): old[name] for name, parameter in module.named_parameters()}
    mapped = {
        change.name.rpartition(".")[2]: sum(
            torch.tensordot(term.matrix, by_parameter[id(term.source)], dims=([1], [term.dim])).movedim(0, term.dim)
            for term in change.moments
        )
        for change in changes
    }
    with torch.no_grad():
        for change in changes:
            change.parameter.copy_(change.value)
    new = gradients()
    for name in ("B_re", "B_im", "C_re", "C_im"):
        assert (mapped[name] - new[name]).norm() <= GRADIENT * new[name].norm() + 1e-12, name


@every_row
def test_every_new_parameter_says_where_its_moments_come_from(family: Family, variant: dict) -> None:
    model, _ = built(family, variant)
    for entry in plan_compression(model, CompreSSMConfig(fraction=0.5)).layers:
        names = {change.name for change in entry.cut.changes}
        assert names == {f"{entry.name}.{name}" for name, _ in ssm_layers(model)[entry.name].named_parameters()} - {
            f"{entry.name}.D"
        }
        for change in entry.cut.changes:
            for term in change.moments:
                new, old = term.matrix.shape
                assert (change.value.shape[term.dim], term.source.shape[term.dim]) == (new, old)
                assert torch.isfinite(term.matrix).all()


def test_batch_norm_buffers_stay() -> None:
    family = S5_CLASSIFIER
    model = family.build().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plan_compression(model, CompreSSMConfig(fraction=0.5, criterion="empirical"), family.calibration())
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
