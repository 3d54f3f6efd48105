"""A cut rewrites every configuration that owns a cut layer, and only for the model that was cut."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, MambaModel

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.families import find_layers
from hf_compressm.models import LRUModel
from tests.family_table import LRU, MAMBA, MAMBA2, Family, family_id, same
from tests.own_modules import (
    Around,
    Twins,
    around_lru,
    around_mamba,
    llava,
    lru_config,
    mamba_config,
    own_layers,
    own_mixers,
    pair,
    plain,
    seeded,
    two_mambas,
)


HALVE = {"fraction": 0.5}
BATCHES = MAMBA.calibration()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings about configurations."""
    found: list[str] = []
    monkeypatch.setattr("hf_compressm.surgery.configuration.logger.warning", found.append)
    return found


def halve(model: nn.Module, **settings: Any) -> dict[str, int]:
    return compress(model, CompreSSMConfig(**{**HALVE, **settings}), BATCHES).state_sizes_after


def loads(part: Any, folder: Path) -> None:
    """A part that was cut is saved, and loads with plain transformers into what it was."""
    part.save_pretrained(folder)
    loaded, info = type(part).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(dict(loaded.state_dict()), dict(part.state_dict()))
    with torch.no_grad():
        one, two = (each.eval()(BATCHES[0]["input_ids"]) for each in (loaded, part))
    name = next(iter(one))
    torch.testing.assert_close(one[name], two[name])


@pytest.mark.parametrize(("build", "suffix"), [(around_mamba, "mixer"), (around_lru, "ssm")])
def test_the_backbone_of_a_module_of_ones_own_gets_sizes_and_record(build: Any, suffix: str, tmp_path: Path) -> None:
    model = build()
    assert halve(model) == {f"bb.layers.{index}.{suffix}": 4 for index in (0, 1)}
    assert model.bb.config.state_size == 4
    assert model.bb.config.compressm["state_sizes_after"] == {f"layers.{index}.{suffix}": 4 for index in (0, 1)}
    assert {id(part.config) for part in model.modules() if hasattr(part, "config")} == {id(model.bb.config)}
    loads(model.bb, tmp_path)


def test_two_backbones_keep_sizes_of_their_own(tmp_path: Path) -> None:
    model = two_mambas()
    halve(model)
    for part, size in ((model.fwd, 4), (model.bwd, 8)):
        assert part.config.state_size == size
        assert part.config.compressm["state_sizes_after"] == {f"layers.{index}.mixer": size for index in (0, 1)}
        loads(part, tmp_path / str(size))


def test_only_the_backbone_that_the_settings_pick_is_cut(tmp_path: Path) -> None:
    model = two_mambas()
    config = model.bwd.config
    assert set(halve(model, layers=["fwd*"])) == {"fwd.layers.0.mixer", "fwd.layers.1.mixer"}
    assert (model.fwd.config.state_size, model.bwd.config.state_size) == (4, 16)
    assert model.bwd.config is config
    assert not hasattr(model.bwd.config, "compressm")
    loads(model.fwd, tmp_path)


def test_one_layer_of_a_backbone_with_one_size_is_refused() -> None:
    model = two_mambas()
    with pytest.raises(ValueError, match=r"pick 1 of 2 layers.*one state size for all"):
        halve(model, layers=["fwd.layers.0.mixer"])
    with pytest.raises(ValueError, match=r"per_layer=True.*MambaModel.*fwd\.layers\.0\.mixer.*single state_size"):
        halve(model, per_layer=True)


@pytest.mark.parametrize("build", [own_mixers, own_layers])
@pytest.mark.parametrize("settings", [{}, {"per_layer": True}])
def test_layers_of_ones_own_keep_sizes_of_their_own(build: Any, settings: dict) -> None:
    model = build()
    assert list(halve(model, **settings).values()) == [4, 8]


@pytest.mark.parametrize("build", [own_mixers, own_layers])
def test_one_of_several_layers_of_ones_own_is_cut(build: Any) -> None:
    model = build()
    name = find_layers(model)[1].name
    assert halve(model, layers=[name], per_layer=True) == {name: 8}
    assert [layer.state_size for layer in find_layers(model)] == [8, 8]


def test_layers_of_ones_own_share_a_size_if_the_settings_say_so() -> None:
    assert list(halve(own_layers(), per_layer=False, fraction=None, target_state_size=5).values()) == [5, 5]


def test_mixers_from_one_configuration_get_copies_of_it() -> None:
    config = mamba_config()
    model = own_mixers(config=config)
    name = find_layers(model)[0].name
    halve(model, layers=[name])
    assert [mixer.config.state_size for mixer in model.mixers] == [4, 8]
    assert config.state_size == 8


def test_a_composite_model_is_cut_saved_and_loaded(tmp_path: Path, told: list[str]) -> None:
    model = llava()
    sizes = halve(model)
    assert told == []
    text = model.config.text_config
    assert text is model.model.language_model.config
    assert model.model.config is model.config
    assert text.mamba_d_state == 4
    assert model.config.compressm["state_sizes_after"] == sizes
    assert text.compressm["state_sizes_after"] == {"layers.0.mamba": 4, "layers.2.mamba": 4}
    loads(model, tmp_path / "whole")
    loads(model.model.language_model, tmp_path / "part")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert list(halve(again).values()) == [2, 2]
    assert len(again.config.compressm["cuts"]) == len(again.config.text_config.compressm["cuts"]) == 2


def test_a_composite_model_inside_a_module_of_ones_own_is_rewritten(tmp_path: Path) -> None:
    model = seeded(lambda: Around(40, inner=nn.ModuleList([])))
    model.inner.append(pair())
    model.forward = lambda input_ids, labels=None: {"logits": model.inner[0](input_ids)["logits"]}
    halve(model)
    inner = model.inner[0]
    assert (inner.config.left_config.state_size, inner.config.right_config.state_size) == (4, 6)
    assert inner.config.compressm["state_sizes_after"]["right.layers.1.ssm"] == 6
    loads(inner, tmp_path)


def test_each_of_two_inner_configurations_gets_its_own_sizes(tmp_path: Path) -> None:
    model = pair()
    halve(model, layers=["left*"])
    assert (model.config.left_config.state_size, model.config.right_config.state_size) == (4, 12)
    assert "compressm" not in vars(model.config.right_config)
    loads(model, tmp_path / "left")
    halve(model)
    assert (model.config.left_config.state_size, model.config.right_config.state_size) == (2, 6)
    loads(model, tmp_path / "both")


def test_sizes_per_layer_of_an_inner_configuration_are_saved(tmp_path: Path) -> None:
    model = pair()
    halve(model, layers=["right.layers.1.ssm"])
    sizes = [layer.state_size for layer in model.config.right_config.per_layer_config]
    assert sizes == [12, 6]
    loads(model, tmp_path)


def test_copies_of_an_inner_configuration_are_rewritten_too(tmp_path: Path) -> None:
    model = pair()
    model.left.config = copy.deepcopy(model.left.config)
    halve(model)
    assert model.left.config.state_size == model.config.left_config.state_size == 4
    loads(model, tmp_path / "whole")
    loads(model.left, tmp_path / "part")


def test_layers_that_one_configuration_counts_as_one_have_one_size(tmp_path: Path) -> None:
    model = seeded(lambda: Twins(lru_config(num_hidden_layers=2)))
    sizes = compress(model, CompreSSMConfig(tolerance=0.2, min_reduction=0), BATCHES).state_sizes_after
    for index in (0, 1):
        assert sizes[f"encoder.layers.{index}.ssm"] == sizes[f"decoder.layers.{index}.ssm"] < 8
    assert model.encoder.config is model.decoder.config is model.config
    model.save_pretrained(tmp_path)
    assert same(dict(Twins.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))
    with pytest.raises(ValueError, match="pick 1 of 2 layers"):
        halve(model, layers=["encoder.layers.0.ssm"])


def test_two_backbones_from_one_configuration_object_get_a_copy_each(tmp_path: Path) -> None:
    config = lru_config()
    model = seeded(lambda: Around(encoder=LRUModel(config), decoder=LRUModel(config)))
    halve(model, layers=["encoder*"])
    assert (model.encoder.config.state_size, model.decoder.config.state_size, config.state_size) == (4, 8, 8)
    assert model.decoder.config is config
    loads(model.encoder, tmp_path / "encoder")
    loads(model.decoder, tmp_path / "decoder")


def test_a_list_of_models_is_rewritten_one_by_one(tmp_path: Path) -> None:
    model = seeded(
        lambda: Around(experts=nn.ModuleList(MambaModel(mamba_config(state_size=size)) for size in (8, 12)))
    )
    halve(model)
    assert [expert.config.state_size for expert in model.experts] == [4, 6]
    loads(model.experts[1], tmp_path)


@pytest.mark.parametrize("compat", ["stock", "best"])
@pytest.mark.parametrize("family", [MAMBA, MAMBA2, LRU], ids=family_id)
def test_another_model_from_the_same_configuration_object_keeps_it(
    family: Family, compat: str, tmp_path: Path
) -> None:
    config = family.config()
    student, teacher = family.model_class(config).eval(), family.model_class(config).eval()
    before, kind = copy.deepcopy(config.to_dict()), type(config)
    compress(student, CompreSSMConfig(target_state_size=4, compat=compat), family.calibration())
    assert teacher.config is config
    assert type(config) is kind
    assert config.to_dict() == before
    assert student.config.state_size == 4
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_a_frozen_teacher_inside_the_students_module_keeps_its_configuration(tmp_path: Path) -> None:
    config = mamba_config()
    model = seeded(lambda: Around(student=MambaModel(config), teacher=MambaModel(config).requires_grad_(False)))
    halve(model, layers=["student*"])
    assert (model.student.config.state_size, model.teacher.config.state_size) == (4, 8)
    loads(model.teacher, tmp_path)


def test_a_backbone_that_is_used_twice_is_rewritten_once(tmp_path: Path) -> None:
    backbone = MambaModel(mamba_config())
    model = seeded(lambda: Around(first=backbone, second=backbone))
    halve(model)
    assert model.first.config is model.second.config
    assert len(model.first.config.compressm["cuts"]) == 1
    loads(model.second, tmp_path)


def test_a_model_around_it_that_says_nothing_of_the_size_is_warned_of(told: list[str]) -> None:
    model = plain()
    sizes = halve(model)
    assert len(told) == 1
    assert "PreTrainedConfig has no state_size for bb.bb.layers.0.mixer: the new state sizes" in told[0]
    assert model.config.compressm["state_sizes_after"] == sizes
    assert model.bb.bb.config.state_size == 4


@pytest.mark.parametrize("compat", ["stock", "best"])
def test_a_stock_model_inside_another_keeps_its_class_and_one_size(compat: str, tmp_path: Path) -> None:
    model = around_mamba()
    sizes = compress(model, CompreSSMConfig(tolerance=0.3, compat=compat, min_reduction=0), BATCHES).state_sizes_after
    assert len(set(sizes.values())) == 1
    assert type(model.bb) is MambaModel
    loads(model.bb, tmp_path)


@pytest.mark.parametrize("build", [around_mamba, llava, pair], ids=lambda build: build.__name__)
def test_a_record_that_cannot_be_read_is_found_in_any_part(build: Any) -> None:
    model = build()
    config = find_layers(model)[0].owner.configs[0]
    assert config is not getattr(model, "config", None)
    config.compressm = {"schema_version": 99}
    with pytest.raises(ValueError, match="schema_version 99"):
        analyze(model, CompreSSMConfig(**HALVE), BATCHES)


def test_an_unusable_record_inside_a_configuration_that_no_module_holds_is_found() -> None:
    model = pair()
    model.left.config = copy.deepcopy(model.config.left_config)
    model.config.left_config.compressm = "mine"
    with pytest.raises(ValueError, match=r"config\.compressm must be an object"):
        analyze(model, CompreSSMConfig(**HALVE), BATCHES)


def test_a_cut_that_fails_leaves_every_configuration_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair()
    before, configs = model.config.to_dict(), [part.config for part in model.modules() if hasattr(part, "config")]

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_compressm.surgery.operation.refuse_stale_caches", fail)
    with pytest.raises(KeyboardInterrupt):
        halve(model)
    assert model.config.to_dict() == before
    assert all(
        a is b for a, b in zip(configs, [p.config for p in model.modules() if hasattr(p, "config")], strict=True)
    )
