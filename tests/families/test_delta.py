"""Gated delta nets: what is seen of them, what a cut writes, and what running the cut layer tells."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.families import find_layers
from hf_compressm.families.calls import Example
from hf_compressm.families.laws import check_laws
from hf_compressm.families.refit import tried
from hf_compressm.families.running import example_of, measured_error, run, tokens_of, with_cut
from tests.families.measuring import calls_of, signals_of
from tests.family_table import (
    DELTA_NETS,
    OLMO_HYBRID,
    QWEN3_5,
    QWEN3_NEXT,
    QWEN4_EXP,
    Family,
    family_id,
    outputs,
    present,
    token_batch,
)
from tests.trainers import trainer_of


every_net = pytest.mark.parametrize("family", [*DELTA_NETS, *present(QWEN4_EXP)], ids=family_id)
one_of_each_layout = pytest.mark.parametrize("family", [QWEN3_NEXT, QWEN3_5, OLMO_HYBRID], ids=family_id)
SUMS = 1e-5
"""Relative error of float32 sums in another order."""
SAME_LOGITS = 1e-4
LIKE_MEASURED = 1.5
"""Predicted and measured errors on other data agree within this factor."""
TWO_CUTS = {"target_state_size": 6, "end": 20, "num_cuts": 2}
LOADED = """
import sys, torch, transformers
assert "hf_compressm" not in sys.modules
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()
tokens = torch.load(sys.argv[1] + "/tokens.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, sys.argv[1] + "/logits.pt")
"""


def layer_and_inputs(family: Family, rows: int = 6, length: int = 24, **kwargs: Any) -> tuple[Any, Example]:
    """The second layer of a model, and what it is called with."""
    model = family.build(**kwargs)
    layer = find_layers(model)[1]
    (_, seen) = calls_of(model, token_batch(rows, length, seed=7))
    example = example_of(seen, rows * length)
    assert example is not None
    return layer, example


def plain(family: Family) -> Any:
    """A model as it is initialised, with larger matrices: a refit of its cut layers helps."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = family.model_class(family.config(state_size=16)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def cut_of(model: nn.Module, layer: Any, **settings: Any) -> Any:
    """What a cut writes to a layer."""
    plan = analyze(model, CompreSSMConfig(**{"target_state_size": 6, **settings}), [token_batch(32, 48, seed=3)])
    return next(each for each in plan.layers if each.name == layer.name)


@every_net
def test_read_out_of_its_states_a_layer_gives_what_its_recurrence_gives(family: Family) -> None:
    model = family.build(state_size=16)
    batch = token_batch(2, 21)
    seen, signals = calls_of(model, batch), signals_of(model, batch)
    for layer, ((signal,), one) in enumerate(zip(signals, seen, strict=True)):
        states = torch.cat([chunk.clone() for chunk in signal.states])  # (length, batch, groups, channels, N)
        given = torch.einsum("lbgcn,blgn->blgc", states, signal.C)
        wanted = one.calls[0].output.unflatten(2, (given.shape[2], -1)).flatten(3, 4)
        assert given.shape[2] * given.shape[3] == 24, layer  # value heads of key heads, or as many of both
        torch.testing.assert_close(given, wanted.detach(), rtol=SUMS, atol=SUMS * float(wanted.detach().abs().max()))


@every_net
def test_its_layout_keeps_the_laws(family: Family) -> None:
    model = family.build(state_size=16)
    layer, seen = find_layers(model)[0], calls_of(model, token_batch(2, 9))[0]
    given = {name: value for name, value in seen.kwargs.items() if not isinstance(value, Cache)}
    check_laws(layer.family, layer.module, seen.args, given)


@pytest.mark.slow
@every_net
@pytest.mark.parametrize("size", [6, 8])
def test_trained_through_two_cuts_it_loads_without_the_package(family: Family, size: int, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path, {**TWO_CUTS, "target_state_size": size}, family.build(state_size=16))
    trainer.args.max_steps = 30
    trainer.train()
    model = trainer.model.eval()
    assert {layer.state_size for layer in find_layers(model)} == {size} == {getattr(model.config, family.size_field)}
    model.save_pretrained(tmp_path / "model")
    tokens = token_batch(2, 12, seed=5)["input_ids"]
    torch.save(tokens, tmp_path / "model" / "tokens.pt")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "model"), type(model).__name__]
    subprocess.run(command, check=True, capture_output=True)
    loaded = torch.load(tmp_path / "model" / "logits.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded, model(input_ids=tokens).logits, rtol=SAME_LOGITS, atol=SAME_LOGITS)


@pytest.mark.slow
def test_inside_a_multimodal_model_its_text_configuration_is_rewritten(tmp_path: Path) -> None:
    text = QWEN3_5.config(state_size=16).to_dict()
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 4,
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    compress(model, CompreSSMConfig(target_state_size=6), [{"input_ids": token_batch()["input_ids"]}])
    assert model.config.text_config.linear_key_head_dim == 6
    model.save_pretrained(tmp_path)
    loaded = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, token_batch()), outputs(model, token_batch()))


def test_a_cut_layer_is_run_on_what_the_layer_was_given() -> None:
    _, example = layer_and_inputs(QWEN3_NEXT, state_size=16)
    model = QWEN3_NEXT.build(state_size=16)
    layer = find_layers(model)[1]
    trial = with_cut(layer, cut_of(model, layer, refit_steps=0).cut).module
    assert layer.module.head_k_dim == 16
    compress(model, CompreSSMConfig(target_state_size=6, refit_steps=0), [token_batch(32, 48, seed=3)])
    cut = find_layers(model)[1].module
    for name, parameter in cut.named_parameters():
        assert torch.equal(dict(trial.named_parameters())[name], parameter), name
    assert torch.equal(run(trial, example), run(cut, example))


@one_of_each_layout
def test_the_predicted_error_is_that_of_other_data(family: Family) -> None:
    model = family.build(state_size=16)
    calls = calls_of(model, token_batch(8, 24, seed=9))
    for layer, seen in zip(find_layers(model), calls, strict=True):
        plan, example = cut_of(model, layer, refit_steps=15), example_of(seen, 8 * 24)
        assert example is not None
        measured = measured_error(layer, plan.cut, [example])
        assert measured / LIKE_MEASURED < plan.predicted_error < measured * LIKE_MEASURED


@one_of_each_layout
def test_a_refit_brings_the_layer_nearer_and_moves_only_queries_and_keys(family: Family) -> None:
    model = plain(family)
    layer = find_layers(model)[0]
    cut, fitted = cut_of(model, layer, refit_steps=0), cut_of(model, layer, refit_steps=60)
    assert fitted.predicted_error < 0.96 * cut.predicted_error
    trial = with_cut(layer, cut.cut)
    free = {id(tensor): mask.bool() for tensor, mask in layer.family.fitted(trial.module)}
    for one, other, parameter in zip(cut.cut.changes, fitted.cut.changes, trial.parameters, strict=True):
        mask = free[id(parameter)]
        assert not torch.equal(one.value[mask], other.value[mask].to(one.value.dtype))
        assert torch.equal(one.value[~mask], other.value[~mask].to(one.value.dtype))


def test_a_refit_is_the_same_when_it_is_done_again() -> None:
    model = QWEN3_5.build(state_size=16)
    one, other = (cut_of(model, find_layers(model)[0], refit_steps=5) for _ in range(2))
    for change, again in zip(one.cut.changes, other.cut.changes, strict=True):
        assert torch.equal(change.value, again.value)


def test_a_refit_that_does_not_help_leaves_the_cut_as_it_was() -> None:
    model = QWEN3_5.build(state_size=16)
    layer = find_layers(model)[0]
    plain = cut_of(model, layer, refit_steps=0)
    (seen, _) = calls_of(model, token_batch(6, 24, seed=3))
    example = example_of(seen, 6 * 24)
    assert example is not None
    broken = copy.copy(example)
    object.__setattr__(broken, "args", ())
    object.__setattr__(broken, "kwargs", {**example.kwargs, "hidden_states": torch.full((6, 24, 16), torch.nan)})
    kept = tried(layer, plain.cut, [broken], steps=3)
    assert kept.changes == plain.cut.changes


def test_a_refit_of_half_precision_is_done_in_float32() -> None:
    model = plain(QWEN3_5).to(torch.bfloat16)
    layer = find_layers(model)[0]
    cut, fitted = cut_of(model, layer, refit_steps=0), cut_of(model, layer, refit_steps=60)
    assert fitted.predicted_error < 0.9 * cut.predicted_error
    compress(model, CompreSSMConfig(target_state_size=6, refit_steps=5), [token_batch(6, 24, seed=3)])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_tolerance_is_the_share_of_the_output_that_running_the_cut_layer_loses() -> None:
    model = QWEN3_NEXT.build(state_size=16)
    data = [token_batch(6, 24, seed=3)]
    sizes = []
    for tolerance in (0.02, 0.1, 0.4):
        settings = {"tolerance": tolerance, "refit_steps": 0, "min_reduction": 0.0}
        plan = analyze(model, CompreSSMConfig(**settings), data)
        sizes.append(plan.layers[0].new_state_size)
        assert max(layer.predicted_error for layer in plan.layers) <= tolerance**0.5
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 16


def test_inputs_are_kept_up_to_a_number_of_tokens_and_without_a_cache() -> None:
    _, example = layer_and_inputs(QWEN3_5, rows=4, length=20)
    assert tokens_of(example) == 4 * 20
    assert not any(isinstance(value, Cache) for value in example.kwargs.values())
    model = QWEN3_5.build()
    (seen, _) = calls_of(model, token_batch(4, 20))
    assert tokens_of(example_of(seen, 45) or example) == 2 * 20
    assert tokens_of(example_of(seen, 7) or example) == 7
    assert example_of(seen, 0) is None


def test_padding_counts_neither_in_the_error_nor_in_the_fit() -> None:
    model = QWEN3_5.build(state_size=16)
    batch = token_batch(6, 24, seed=3)
    longer = {"input_ids": torch.cat([batch["input_ids"], batch["input_ids"][:, :9]], dim=1)}
    longer["attention_mask"] = torch.cat([torch.ones(6, 24), torch.zeros(6, 9)], dim=1).long()
    settings = CompreSSMConfig(target_state_size=6, refit_steps=0)
    whole, padded = (analyze(model, settings, [data]) for data in ({"input_ids": batch["input_ids"]}, longer))
    for one, other in zip(whole.layers, padded.layers, strict=True):
        assert one.predicted_error == pytest.approx(other.predicted_error, rel=SAME_LOGITS)


def test_sizes_are_those_that_kernels_take() -> None:
    family = find_layers(QWEN3_5.build())[0].family
    sizes = {"cpu float32": (torch.float32, "cpu"), "cpu bfloat16": (torch.bfloat16, "cpu")}
    sizes["gpu"] = (torch.bfloat16, "cuda")
    found = {}
    for name, (dtype, device) in sizes.items():
        weight = SimpleNamespace(device=torch.device(device), element_size=torch.empty(0, dtype=dtype).element_size)
        found[name] = family.granularity(SimpleNamespace(parameters=lambda weight=weight: iter([weight])))
    assert found == {"cpu float32": 1, "cpu bfloat16": 2, "gpu": 16}
    result = compress(QWEN3_5.build(torch.bfloat16), CompreSSMConfig(target_state_size=5), [QWEN3_5.batch()])
    assert set(result.state_sizes_after.values()) == {6}
