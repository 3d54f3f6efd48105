"""Cutting a model: sizes, function, record, saving and loading, and all or nothing."""

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_compressm import CompreSSMConfig, analyze, apply_plan, compress, plan_compression
from hf_compressm.compression import applying, compare_tolerances
from tests.family_table import (
    LANGUAGE_MODELS,
    LINEAR,
    LRU,
    MAMBA,
    STATE_SIZE,
    Family,
    each,
    family_id,
    outputs,
    owner_of_a_cut_parameter,
    same,
    snapshot,
    ssm_layers,
    states_of,
    token_batch,
    train_step,
)


SINGLE = 1e-4
"""Relative; float32 outputs of models of this size computed in two ways."""
DOUBLE = 1e-10
every_family = pytest.mark.parametrize("family", each(), ids=family_id)
linear_family = pytest.mark.parametrize("family", LINEAR, ids=family_id)
language_model = pytest.mark.parametrize("family", each(LANGUAGE_MODELS), ids=family_id)


def cut(model: nn.Module, family: Family, size: int = 4, **settings: object):
    dtype = next(model.parameters()).dtype
    config = CompreSSMConfig(**{"target_state_size": size, **settings})
    return compress(model, config, family.calibration(dtype=dtype))


def owner_and_name(layer: nn.Module) -> str:
    owner, name = owner_of_a_cut_parameter(layer)
    place = next(place for place, module in layer.named_modules() if module is owner)
    return f"{place}.{name}" if place else name


def name_of(layer: nn.Module, model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@every_family
def test_a_cut_sets_every_size_and_the_record(family: Family) -> None:
    model = family.build()
    before = sum(p.numel() for p in model.parameters())
    result = cut(model, family)
    names = list(ssm_layers(model))
    assert result.changed
    assert result.state_sizes_before == dict.fromkeys(names, STATE_SIZE)
    assert result.state_sizes_after == dict.fromkeys(names, 4)
    assert (result.parameters_before, result.parameters_after) == (before, sum(p.numel() for p in model.parameters()))
    assert result.parameters_after < before
    assert getattr(model.config, family.size_field) == 4
    assert not model.config.is_heterogeneous
    for layer in ssm_layers(model).values():
        if family.is_stock:
            fresh = dict(family.build(state_size=4).get_submodule(name_of(layer, model)).named_parameters())
            assert states_of(layer) == 4
            assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in fresh.items()}
        else:
            assert (layer.state_size, layer.slots) == (4, 4 // family.granularity)
    record = json.loads(json.dumps(model.config.compressm, allow_nan=False))
    assert record["state_sizes_before"] == result.state_sizes_before
    assert record["state_sizes_after"] == result.state_sizes_after
    assert [entry["step"] for entry in record["cuts"]] == [None]
    cut(model, family, 2)
    record = model.config.compressm
    assert (record["state_sizes_before"], len(record["cuts"])) == (result.state_sizes_before, 2)
    assert set(record["state_sizes_after"].values()) == {2}


@every_family
def test_saved_and_loaded_again_the_model_is_the_same(family: Family, tmp_path: Path) -> None:
    model = family.build()
    cut(model, family)
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if family.is_language_model else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, family.batch()), outputs(model, family.batch()))
    assert loaded.config.compressm == model.config.compressm


@linear_family
def test_sizes_per_layer_are_saved_and_loaded(family: Family, tmp_path: Path) -> None:
    model = family.build()
    cut(model, family, layers=["layers.1.ssm"])
    assert [layer.state_size for layer in model.config.per_layer_config] == [STATE_SIZE, 4]
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if family.is_language_model else AutoModelForSequenceClassification
    assert torch.equal(outputs(auto.from_pretrained(tmp_path), family.batch()), outputs(model, family.batch()))
    cut(model, family, layers=["layers.0.ssm"])
    assert not model.config.is_heterogeneous
    assert model.config.state_size == 4


LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_compressm"] = None
import torch
from transformers import MambaForCausalLM
folder = sys.argv[1]
model = MambaForCausalLM.from_pretrained(folder)
saved = torch.load(folder + "/expected.pt", weights_only=True)
with torch.no_grad():
    assert torch.allclose(model(saved["input_ids"]).logits, saved["logits"], rtol=1e-4, atol=1e-4)
"""


def test_plain_transformers_loads_a_cut_mamba_where_the_package_cannot_be_imported(tmp_path: Path) -> None:
    model = MAMBA.build()
    cut(model, MAMBA)
    model.save_pretrained(tmp_path)
    tokens = token_batch()["input_ids"]
    torch.save({"input_ids": tokens, "logits": outputs(model, {"input_ids": tokens})}, tmp_path / "expected.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD_WITHOUT_THE_PACKAGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@language_model
def test_generation_with_a_cache_agrees_with_the_whole_sequence_after_a_cut(family: Family) -> None:
    model = family.build()
    cut(model, family)
    tokens = token_batch(2, 5)["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    logits = outputs(model, {"input_ids": generated})
    assert torch.equal(logits[:, 4:-1].argmax(-1), generated[:, 5:])


@linear_family
@pytest.mark.parametrize("criterion", ["hankel", "empirical"])
@pytest.mark.parametrize("realization", ["real", "complex"])
def test_states_without_a_share_in_the_output_go_without_a_trace(
    family: Family, criterion: str, realization: str
) -> None:
    if criterion == "empirical" and realization == "complex":
        realization = "real"
    model = family.build(torch.float64, state_size=12)
    for layer in ssm_layers(model).values():
        kept = layer.slots // 3
        for part in ("re", "im"):
            getattr(layer, f"B_{part}").data[kept:] = 0
    batch = family.calibration(dtype=torch.float64)[0]
    before = outputs(model, batch)
    result = cut(model, family, 8, criterion=criterion, realization=realization)
    assert result.changed
    assert relative(outputs(model, batch), before) < DOUBLE
    assert all(layer.predicted_error < 1e-6 for layer in result.plan.layers)


@linear_family
def test_padding_slots_have_the_size_asked_for_and_learn(family: Family) -> None:
    model = family.build(torch.float64, state_size=12)
    for layer in ssm_layers(model).values():  # one real state does all the work
        for name in ("B_re", "B_im"):
            getattr(layer, name).data[1:] = 0
        getattr(layer, "theta" if family is LRU else "Lambda_im").data[0] = 0
    batch = family.calibration(dtype=torch.float64)[0]
    before = outputs(model, batch)
    optimizer = torch.optim.AdamW(model.parameters())
    compress(model, CompreSSMConfig(target_state_size=8), optimizer=optimizer)
    assert relative(outputs(model, batch), before) < DOUBLE
    model(**batch).loss.backward()
    for layer in ssm_layers(model).values():
        assert layer.slots == 8 // family.granularity
        assert (layer.B_re.grad.abs().sum(1) > 0).all()
        old = layer.B_re.detach().clone()
        optimizer.step()
        assert (layer.B_re != old).any(dim=1).all()


@every_family
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.float16, torch.float32, torch.float64)),
    ],
)
def test_parameters_keep_their_dtype_and_the_model_runs(family: Family, dtype: torch.dtype) -> None:
    if torch.promote_types(dtype, family.widest) != family.widest:
        pytest.skip("transformers' experts have no float64")
    model = family.build(dtype)
    assert cut(model, family).changed
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    batch = family.calibration(dtype=dtype)[0]
    assert torch.isfinite(outputs(model, batch)).all()


@every_family
def test_a_plan_is_applied_once(family: Family) -> None:
    model = family.build()
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5), family.calibration())
    apply_plan(model, plan)
    after = snapshot(model)
    with pytest.raises(ValueError, match="new plan"):
        apply_plan(model, plan)
    assert same(snapshot(model), after)


@every_family
@pytest.mark.parametrize("kind", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_plan_from_before_a_training_step_is_refused(family: Family, kind: dict) -> None:
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters(), **kind)
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5), family.calibration())
    train_step(model, optimizer, family.batch())
    before = snapshot(model)
    with pytest.raises(ValueError, match="trained since the plan"):
        apply_plan(model, plan, optimizer)
    assert same(snapshot(model), before)


def test_a_plan_from_before_a_write_through_data_is_refused() -> None:
    model = LRU.build()
    plan = plan_compression(model, CompreSSMConfig(fraction=0.5))
    next(iter(ssm_layers(model).values())).B_re.data += 1
    with pytest.raises(ValueError, match="trained since the plan"):
        apply_plan(model, plan)


def test_a_plan_of_another_model_is_refused() -> None:
    model, other = LRU.build(), LRU.build()
    plan = plan_compression(other, CompreSSMConfig(fraction=0.5))
    before = snapshot(model)
    with pytest.raises(ValueError, match="no longer the parameter"):
        apply_plan(model, plan)
    assert same(snapshot(model), before)


@every_family
def test_an_optimizer_of_another_model_is_refused_before_anything_changes(family: Family) -> None:
    model, other = family.build(), family.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"parameter.*that the model does not have"):
        compress(model, CompreSSMConfig(fraction=0.5), family.calibration(), torch.optim.AdamW(other.parameters()))
    assert same(snapshot(model), before)


@every_family
def test_the_old_tensors_are_freed_once_the_result_is_all_that_is_left(family: Family) -> None:
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, family.batch())
    old = {f"{name}.{part}": p for name, layer in ssm_layers(model).items() for part, p in layer.named_parameters()}
    moments = [weakref.ref(optimizer.state[p]["exp_avg"]) for p in old.values()]
    references = {name: weakref.ref(parameter) for name, parameter in old.items()}
    del old
    result = compress(model, CompreSSMConfig(fraction=0.5), family.calibration(), optimizer)
    gc.collect()
    gone = {name for name, reference in references.items() if reference() is None}
    cut_names = {f"{name}.{owner_and_name(layer)}" for name, layer in ssm_layers(model).items()}
    assert gone >= cut_names
    alive = {id(parameter) for parameter in model.parameters()}
    assert all(reference() is None or id(reference()) in alive for reference in references.values())
    held = {id(state["exp_avg"]) for state in optimizer.state.values()}
    assert all(moment() is None or id(moment()) in held for moment in moments)
    assert result.changed


def test_a_parameter_shared_by_two_layers_is_refused() -> None:
    model = LRU.build()
    first, second = ssm_layers(model).values()
    second.B_re = first.B_re
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.ssm\.B_re and .*layers\.0\.ssm.*shared"):
        compress(model, CompreSSMConfig(fraction=0.5))
    assert same(snapshot(model), before)


@every_family
def test_a_second_name_of_a_cut_parameter_follows(family: Family) -> None:
    model = family.build()
    layer = next(iter(ssm_layers(model).values()))
    watcher = nn.Module()
    owner, name = owner_of_a_cut_parameter(layer)
    watcher.seen = getattr(owner, name)
    model.watcher = watcher
    cut(model, family)
    assert watcher.seen is getattr(owner, name)
    assert "seen" in dict(watcher.named_parameters())


@language_model
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(family: Family, tied: bool) -> None:
    if tied and family.family in ("nemotron_h", "xlstm"):
        pytest.skip(f"transformers does not tie the embeddings of {family.family}")
    model = family.build(tie_word_embeddings=tied)
    cut(model, family)
    assert (model.get_input_embeddings().weight is model.lm_head.weight) is tied


@every_family
def test_a_copy_and_a_gate_that_blocks_leave_the_model_bit_equal(family: Family) -> None:
    model = family.build()
    before, twin = snapshot(model), copy.deepcopy(model)
    cut(twin, family)
    assert same(snapshot(model), before)
    result = compress(model, CompreSSMConfig(tolerance=0.01, min_reduction=0.99), family.calibration())
    assert not result.changed
    assert same(snapshot(model), before)
    assert not hasattr(model.config, "compressm")


def test_a_parameter_that_its_dtype_cannot_hold_skips_the_cut() -> None:
    model = LRU.build()
    with torch.no_grad():
        for layer in ssm_layers(model).values():  # equal states become one whose input is sqrt(N) times as large
            for name, value in {"nu_log": -2, "theta": 1, "gamma_log": 0, "B_re": 6e4, "B_im": 0, "C_im": 0}.items():
                getattr(layer, name).fill_(value)
            layer.C_re.fill_(1.0)
    model.half()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        compress(model, CompreSSMConfig(target_state_size=2, on_nonfinite="raise"))
    assert same(snapshot(model), before)
    result = compress(model, CompreSSMConfig(target_state_size=2))
    assert not result.changed
    assert {layer.status for layer in result.plan.layers} == {"skipped"}
    assert same(snapshot(model), before)


def test_realization_complex_and_the_surrogate_run() -> None:
    model = LRU.build()
    assert cut(model, LRU, realization="complex").changed
    model = MAMBA.build()
    assert cut(model, MAMBA, criterion="surrogate").plan.layers[0].criterion == "surrogate"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad of everything it meets
def test_a_compiled_mamba_keeps_training_after_cuts_without_their_old_graphs() -> None:
    model = MAMBA.build()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        train_step(compiled, optimizer, MAMBA.batch())
        for _ in range(2):
            compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration(), optimizer)
            train_step(compiled, optimizer, MAMBA.batch())
        torch.compiler.reset()  # evaluation is a graph of its own
        assert relative(outputs(compiled.eval(), MAMBA.batch()), outputs(model.eval(), MAMBA.batch())) < SINGLE


def test_settings_are_taken_in_any_form(tmp_path: Path) -> None:
    config = CompreSSMConfig(tolerance=0.3, min_reduction=0.0)
    config.to_file(tmp_path / "cuts.yaml")
    wanted = analyze(LRU.build(), config).to_dict()
    for form in (config.to_dict(), {"tolerance": 0.3, "min_reduction": 0.0}, tmp_path / "cuts.yaml"):
        assert analyze(LRU.build(), form).to_dict() == plan_compression(LRU.build(), form).to_dict() == wanted
        assert compress(LRU.build(), form).plan.to_dict() == wanted
        assert compare_tolerances(LRU.build(), [0.3], form)[0].plan.to_dict() == wanted
    assert compress(LRU.build(), None).plan.to_dict() == analyze(LRU.build()).to_dict()


@pytest.mark.parametrize("work", [analyze, compress, plan_compression])
def test_what_are_no_settings_changes_nothing(work) -> None:
    model = LRU.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"a mapping such as \{'tolerance': 0.1\}.*got 0.5"):
        work(model, 0.5)
    with pytest.raises(ValueError, match="Unknown setting"):
        work(model, {"tolerence": 0.5})
    assert same(snapshot(model), before)


@pytest.mark.parametrize(("gradients", "level"), [(True, "WARNING"), (False, "INFO")])
def test_a_cut_without_the_optimizer_says_what_becomes_of_one_that_was_made_before(
    gradients: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    for name in ("warning", "info"):
        monkeypatch.setattr(applying.logger, name, lambda text, name=name: seen.append((name.upper(), text)))
    model = MAMBA.build()
    if gradients:
        model(**MAMBA.batch()).loss.backward()
    result = compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    assert "goes on training the old tensors" in result.note
    assert result.note in str(result)
    assert str(result.plan) in str(result)
    assert (level, result.note) in seen


def test_there_is_nothing_to_say_with_an_optimizer_or_without_a_cut() -> None:
    model = MAMBA.build()
    optimizer = torch.optim.AdamW(model.parameters())
    assert compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration(), optimizer).note == ""
    assert compress(model, CompreSSMConfig(target_state_size=4), MAMBA.calibration()).note == ""
    assert "training the old tensors" in (compress.__doc__ or "")
