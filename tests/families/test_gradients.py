"""criterion="fisher": its moments and predictions are those of gradients taken directly, and it leaves no trace."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_compressm import CompreSSMConfig, compress, plan_compression
from hf_compressm.families import CutMethod, SSMLayer, collect_statistics, find_layers, running
from hf_compressm.families.calls import Seen, signals, unrepeated
from hf_compressm.families.gradients import scored_in
from hf_compressm.families.running import with_cut
from hf_compressm.families.watching import watching
from hf_compressm.loops.recent import Batch
from hf_compressm.models import CompreSSMamba2ForCausalLM
from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from tests.families.measuring import Recorded
from tests.family_table import LRU, MAMBA, MAMBA2, QWEN3_NEXT, S5, Family, family_id, same, snapshot, token_batch


FAMILIES = [MAMBA, MAMBA2, QWEN3_NEXT]
IGNORED = -100
FISHER = CompreSSMConfig(criterion="fisher", fraction=0.5, refit_steps=0)
EXACT = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Relative: round-off of sums over tokens and channels in the widest dtype of the family; stock scans have 32 bits."""
SIXTEEN_BITS = 0.15
"""Relative: bfloat16 has 8 bits, and the gradients pass through a model of two layers."""
NUDGE, QUOTIENT = 3e-2, 1e-2
"""Share of the change of a layer's output, and relative: norms in 32 bits round smaller nudges away."""
Forward = Callable[[nn.Module, Any], Any]


@pytest.fixture
def scans_in_float64() -> Iterator[None]:
    """Those of this package; stock ones are in float32."""
    enable_fast_selective_scan()
    yield
    disable_fast_selective_scan()


def batch_of(side: str | None = None) -> dict[str, Tensor]:
    """Texts of which some labels are ignored, among them those of the first tokens; padded on one side."""
    batch = token_batch(4, 12, seed=3)
    batch["labels"][:, 0] = batch["labels"][1, 4:7] = IGNORED
    if side is None:
        return batch
    pad = (4, 0) if side == "left" else (0, 4)
    mask = F.pad(torch.ones_like(batch["input_ids"]), pad)
    return {
        "input_ids": F.pad(batch["input_ids"], pad, value=1),
        "labels": F.pad(batch["labels"], pad, value=IGNORED),
        "attention_mask": mask,
    }


def loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def measured_by(model: nn.Module, batches: list, forward: Forward = loss_of_model) -> list[dict[str, Tensor]]:
    """P, Q and M of every layer, as the package takes them."""
    layers = find_layers(model)
    found = collect_statistics(model, layers, [CutMethod("fisher")] * len(layers), batches, forward)
    return [{name: item.mean(name) for name in ("P", "Q", "M") if name in item.sums} for item in found]


def directly(model: nn.Module, batch: Any, scored: int, forward: Forward = loss_of_model) -> list[dict[str, Tensor]]:
    """P, Q and M of every layer from `torch.autograd.grad`, summed token by token."""
    recorded = [(layer, Recorded()) for layer in find_layers(model)]
    with watching(model, recorded):
        loss = forward(model, batch)
    seen: list[Seen] = [call for _, item in recorded for call in item.seen]
    families: list[Any] = [layer.family for layer, item in recorded for _ in item.seen]
    gradients = torch.autograd.grad(loss, [each.calls[0].output for each in seen])
    found = []
    for each, family, gradient in zip(seen, families, gradients, strict=True):
        (call,) = (unrepeated(call, family.layout.groups_of(each.module)) for call in each.calls)
        call.gain = gradient.abs()
        signal = signals(call, each.mask)
        h = torch.cat([chunk.clone() for chunk in signal.states]).double()  # (length, batch, groups, channels, N)
        weight = scored * signal.gain.double().square()
        C = signal.C.double().transpose(0, 1)  # (length, batch, groups, N)
        read = h * C[..., None, :]
        heard = signal.mask.double().T
        values = {
            "P": torch.einsum("tbgc,tbgcn,tbgcm->gnm", weight, h, h),
            "Q": torch.einsum("tb,tbgn,tbgm->gnm", heard, C, C) / heard.sum(),
        }
        values["M"] = torch.einsum("tbgc,tbgcn,tbgcm->gnm", weight, read, read)
        found.append(values)
    return found


def assert_close(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], tolerance: float) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert {"P", "Q"} <= one.keys()
        for name, value in one.items():
            assert float(value.norm()) > 0
            assert float((value - other[name]).norm()) <= tolerance * float(other[name].norm()), name


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("family", FAMILIES, ids=family_id)
def test_moments_are_weighted_by_the_gradient_of_the_loss(family: Family, side: str | None) -> None:
    model, batch = family.build(family.widest), batch_of(side)
    scored = 4 * 11 - 3
    assert int((batch["labels"] != IGNORED).sum()) == scored
    assert_close(measured_by(model, [batch]), directly(model, batch, scored), EXACT[family.widest])


def test_moments_are_means_over_batches() -> None:
    model, batches = MAMBA2.build(torch.float64), [token_batch(4, seed=seed) for seed in (1, 2)]
    every = [directly(model, batch, 4 * 11) for batch in batches]
    wanted = [{name: (one[name] + other[name]) / 2 for name in one} for one, other in zip(*every, strict=True)]
    assert_close(measured_by(model, batches), wanted, EXACT[torch.float64])


def test_labels_of_a_classifier_count_rows() -> None:
    def classified(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits.mean(dim=1)
        return F.cross_entropy(logits, batch["labels"])

    model = MAMBA2.build(torch.float64)
    batch = {**token_batch(4), "labels": torch.tensor([1, 0, IGNORED, 3])}
    wanted = directly(model, batch, 3, classified)
    assert_close(measured_by(model, [batch], classified), wanted, EXACT[torch.float64])


@pytest.mark.parametrize(
    ("labels", "scored"),
    [
        (torch.full((2, 5), 3), 8),
        (torch.tensor([[1, 2, 3], [IGNORED, IGNORED, 3]]), 3),
        (torch.tensor([1, 2, IGNORED]), 2),
        (torch.tensor([[1], [2], [0]]), 3),
        (torch.zeros(3, 4), 12),
        (torch.full((2, 5), IGNORED), 0),
        (torch.zeros(2, 3, 4), None),
        ([1, 2], None),
    ],
)
def test_labels_that_count(labels: Any, scored: int | None) -> None:
    assert scored_in({"labels": labels}) == scored
    assert scored_in(Batch({"labels": labels}, {})) == scored  # of a Trainer
    assert scored_in(Batch((), {"labels": labels})) == scored  # of a loop of one's own
    assert scored_in((labels,)) is None


def output_of(
    layer: SSMLayer, model: nn.Module, batch: Any, nudge: Tensor | None = None
) -> tuple[Tensor, Any, Tensor]:
    """The loss of a model, what a layer was called with, and its output, which is nudged if that is wanted."""
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        tensor = tensor if nudge is None else tensor + nudge
        seen.append((args, kwargs, tensor))
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    logits: list[Tensor] = []  # transformers rounds those that it returns, and its loss, to 32 bits
    handles = [
        layer.module.register_forward_hook(hook, with_kwargs=True),
        model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output)),
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    loss = F.cross_entropy(logits[0][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return loss, seen[0][:2], seen[0][2]


@pytest.mark.usefixtures("scans_in_float64")
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("family", [MAMBA, MAMBA2], ids=family_id)
def test_the_predicted_change_is_the_second_order_of_the_loss(family: Family, side: str | None) -> None:
    model = family.build(torch.float64, residual_in_fp32=False)
    batch, scored = {**batch_of(side), "use_cache": False}, 41
    plan = plan_compression(model, FISHER, [batch])
    for layer, planned in zip(find_layers(model), plan.layers, strict=True):
        loss, (args, kwargs), output = output_of(layer, model, batch)
        (gradient,) = torch.autograd.grad(loss, output)
        with torch.no_grad():
            result: Any = with_cut(layer, planned.cut).module(*args, **kwargs)
        change = (result[0] if isinstance(result, tuple) else result) - output.detach()
        change = change * batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
        terms = (gradient * change).sum(dim=(1, 2))
        assert planned.predicted_loss_change == pytest.approx(
            float(terms.sum() + 0.5 * scored * terms.square().sum()), rel=1e-4
        )
        with torch.no_grad():
            higher, lower = (output_of(layer, model, batch, sign * NUDGE * change)[0] for sign in (1, -1))
        assert float(terms.sum()) == pytest.approx(float(higher - lower) / (2 * NUDGE), rel=QUOTIENT)


@pytest.mark.parametrize("family", FAMILIES, ids=family_id)
def test_the_change_of_a_plan_is_what_the_cut_then_adds(family: Family) -> None:
    model, batches = family.build(family.widest), [token_batch(4, seed=seed) for seed in (1, 2)]

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches) / 2

    before = loss()
    result = compress(model, FISHER, batches)
    assert result.changed
    expected = result.plan.predicted_loss_change
    assert expected == pytest.approx(loss() - before, rel=1e-3, abs=1e-6)
    assert f"loss: {expected:+.4f} expected" in str(result)


def test_rows_that_are_cut_short_stand_for_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = MAMBA2.build(torch.float64), token_batch(4, 12)
    monkeypatch.setattr(running, "LONGEST", 6)
    layer = find_layers(model)[0]
    (statistics, *_) = collect_statistics(model, [layer], [CutMethod("fisher")], [batch])
    (example,) = statistics.examples
    loss, _, output = output_of(layer, model, batch)
    (gradient,) = torch.autograd.grad(loss, output)
    assert example.scored == pytest.approx(11 / 2)  # half of the losses of a row
    assert torch.allclose(example.gradient / example.scored, 2 * 4 * gradient[:, :6], rtol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_nothing_is_left_behind(train: bool) -> None:
    model = MAMBA2.build().train(train)
    first, *others = model.parameters()
    first.grad, others[3].requires_grad = torch.ones_like(first), False
    before, flags = snapshot(model), [parameter.requires_grad for parameter in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    plan_compression(model, CompreSSMConfig(criterion="fisher", fraction=0.5), MAMBA2.calibration())
    assert same(snapshot(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", FAMILIES, ids=family_id)
def test_frozen_models_are_measured_alike(family: Family) -> None:
    model, batch = family.build(family.widest), batch_of()
    wanted = measured_by(model, [batch])
    assert_close(measured_by(model.requires_grad_(False), [batch]), wanted, EXACT[family.widest])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_modes_of_the_caller_do_not_matter(mode: Any) -> None:
    model = MAMBA2.build()
    wanted = plan_compression(model, FISHER, MAMBA2.calibration()).to_dict()
    with mode():
        assert plan_compression(model, FISHER, MAMBA2.calibration()).to_dict() == wanted


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_models_under_gradient_checkpointing_are_measured_alike(train: bool, reentrant: bool) -> None:
    model, batch = MAMBA2.build(), batch_of()
    wanted = measured_by(model, [batch])
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert_close(measured_by(model.train(train), [batch]), wanted, EXACT[torch.float32])


def test_a_model_that_checkpoints_in_evaluation_too_is_measured_alike() -> None:
    model, batch = MAMBA2.build(), {**batch_of(), "use_cache": False}  # a cache would be read by the second pass
    wanted = measured_by(model, [batch])
    for block in model.backbone.layers:
        forward = block.forward
        block.forward = lambda *args, _forward=forward, **kwargs: checkpoint(
            _forward, *args, use_reentrant=False, **kwargs
        )
    assert_close(measured_by(model, [batch]), wanted, EXACT[torch.float32])


@pytest.mark.parametrize("how", ["parameters", "autocast"])
@pytest.mark.parametrize("family", FAMILIES, ids=family_id)
def test_sixteen_bits_are_enough(family: Family, how: str) -> None:
    batch = batch_of()
    wanted = measured_by(family.build(), [batch])
    model = family.build(torch.bfloat16 if how == "parameters" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = measured_by(model, [batch])
        plan = plan_compression(model, FISHER, [batch])
    if family is not QWEN3_NEXT:  # whose gradients in 16 bits are others
        assert_close(found, wanted, SIXTEEN_BITS)
    assert plan.predicted_loss_change is not None
    assert all(layer.predicted_loss_change is not None for layer in plan.layers)


def test_gradients_that_are_too_small_for_16_bits_count() -> None:
    """Of a mean over so many tokens that its gradients are next to nothing in float16."""
    batch, many = batch_of(), 10**5
    labels = torch.zeros(many + 1, 1, dtype=torch.long)

    def mean_over_many(model: nn.Module, _: Any) -> Tensor:
        return model(**batch).loss * 41 / (many + 1)

    model = MAMBA2.build(torch.float16)
    found = measured_by(model, [{"labels": labels}], mean_over_many)
    wanted = measured_by(MAMBA2.build(), [{"labels": labels}], mean_over_many)
    assert_close(found, wanted, SIXTEEN_BITS)


def complaint(batch: dict[str, Tensor], forward: Forward | None = None) -> str:
    layers = find_layers(model := MAMBA2.build())
    arguments = () if forward is None else (forward,)
    with pytest.raises(ValueError, match="Calibration batch 1") as caught:
        collect_statistics(model, layers, [CutMethod("fisher")] * len(layers), [batch], *arguments)
    return str(caught.value)


def test_a_batch_without_labels_is_told_as_that() -> None:
    assert complaint({"input_ids": token_batch(2, 5)["input_ids"]}) == (
        "Calibration batch 1 with {'input_ids': (2, 5)} cannot be used: ValueError: criterion='fisher' needs a loss, "
        "and the model returned a Mamba2CausalLMOutput without one. Add labels to the batch, or choose another "
        "criterion."
    )


def test_a_loss_that_does_not_depend_on_the_layers_is_told_as_that() -> None:
    def constant(model: nn.Module, batch: Any) -> Tensor:
        model(**batch)
        return torch.ones(())

    def of_embeddings(model: nn.Module, batch: Any) -> Tensor:
        model(**batch)
        return model.get_input_embeddings().weight.sum()

    for forward in (constant, of_embeddings):
        assert "its loss does not depend on what the layers compute" in complaint(token_batch(2, 5), forward)


def test_a_batch_of_which_nothing_is_scored_is_left_out() -> None:
    model, batch = MAMBA2.build(), batch_of()
    nothing = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    assert_close(measured_by(model, [nothing, batch]), measured_by(model, [batch]), EXACT[torch.float32])
    plan = plan_compression(model, FISHER, [nothing])
    assert {layer.status for layer in plan.layers} == {"skipped"}


def test_of_layers_that_run_twice_in_a_batch_no_change_is_predicted() -> None:
    model, batch = MAMBA2.build(), batch_of()

    def twice(model: nn.Module, batch: Any) -> Tensor:
        return (model(**batch).loss + model(**batch).loss) / 2

    layers = find_layers(model)
    found = collect_statistics(model, layers, [CutMethod("fisher")] * len(layers), [batch], twice)
    assert all(item.tokens == 2 * batch["input_ids"].numel() for item in found)
    assert all(example.gradient is None for item in found for example in item.examples)


def test_a_reference_pass_without_gradients_is_no_harm() -> None:
    model, batch = MAMBA2.build(), batch_of()

    def beside_a_reference(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            model(**batch)
        return model(**batch).loss

    wanted = measured_by(model, [batch])
    for one, other in zip(measured_by(model, [batch], beside_a_reference), wanted, strict=True):
        assert torch.allclose(2 * one["M"], other["M"])  # as many tokens again, at which nothing is heard


def test_layers_that_a_batch_does_not_run_are_skipped_for_that() -> None:
    model = MAMBA2.build()

    def without_layers(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model.lm_head(model.get_input_embeddings()(batch["input_ids"])).flatten(0, 1), labels)

    labels = torch.zeros(2 * 5, dtype=torch.long)
    layers = find_layers(model)
    found = collect_statistics(model, layers, [CutMethod("fisher")] * len(layers), [token_batch(2, 5)], without_layers)
    assert {item.problem for item in found} == {"the calibration did not run through it"}


def test_own_classes_are_projected() -> None:
    model, batches = MAMBA2.build(), MAMBA2.calibration()
    config = CompreSSMConfig(criterion="fisher", fraction=0.5, compat="best", refit_steps=0)
    result = compress(model, config, batches)
    assert isinstance(model, CompreSSMamba2ForCausalLM)
    assert result.plan.predicted_loss_change is not None
    again = compress(copy.deepcopy(model), config, batches)  # a model that is of that class already
    assert set(again.state_sizes_after.values()) == {2}


@pytest.mark.parametrize("family", [LRU, S5], ids=family_id)
def test_layers_that_do_not_depend_on_data_refuse_it(family: Family) -> None:
    with pytest.raises(ValueError, match=r"fisher.*choose one of.*empirical.*hankel"):
        plan_compression(family.build(), FISHER, family.calibration())
