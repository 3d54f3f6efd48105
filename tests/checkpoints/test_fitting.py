"""What a checkpoint says of its model is checked before anything is built from it, or changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compressm import CompreSSMConfig, compress, verify_checkpoint
from hf_compressm.checkpoints import fit_to_checkpoint, load_converted, read_saved
from tests.family_table import (
    BAMBA,
    LRU,
    MAMBA,
    MAMBA2,
    S5,
    STATE_SIZE,
    Family,
    each,
    family_id,
    outputs,
    same,
    snapshot,
    train_step,
)


WEIGHTS = "model.safetensors"
every_family = pytest.mark.parametrize("family", each(), ids=family_id)
BROKEN_FAMILIES = (LRU, S5, MAMBA, MAMBA2, BAMBA)
some_families = pytest.mark.parametrize("family", [LRU, S5, MAMBA2], ids=family_id)
UNEVEN = {"tolerance": 0.3, "compat": "best", "per_layer": True}


def saved(family: Family, folder: Path, seed: int = 1, **settings: Any) -> Any:
    """A cut model, saved."""
    model = family.build(seed=seed)
    compress(model, CompreSSMConfig(**(settings or {"target_state_size": 4})), family.calibration())
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family.name: tmp_path_factory.mktemp(family.name) for family in BROKEN_FAMILIES}
    for family in BROKEN_FAMILIES:
        saved(family, folders[family.name])
    return folders


@pytest.fixture
def folder_of(originals: dict[str, Path], tmp_path: Path) -> Callable[[Family], Path]:
    """A copy of a family's saved model, to be broken."""

    def copied(family: Family) -> Path:
        return Path(shutil.copytree(originals[family.name], tmp_path / f"saved-{family.name}"))

    return copied


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refused(family: Family, folder: Path, match: str, whole_by_itself: bool = False) -> None:
    """Both ways in refuse it with the folder's name and `match`, and the model stays what it was, bit for bit."""
    if not whole_by_itself:
        with pytest.raises(ValueError, match=match) as caught:
            verify_checkpoint(folder)
        assert str(folder) in str(caught.value)
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before, moments = snapshot(model), optimizer.state_dict()
    held, kinds = [id(p) for p in optimizer.param_groups[0]["params"]], (type(model), type(model.config))
    with pytest.raises(ValueError, match=match) as caught:
        fit_to_checkpoint(model, read_saved(folder), optimizer)
    assert str(folder) in str(caught.value)
    assert same(snapshot(model), before)
    assert same(optimizer.state_dict(), moments)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert (type(model), type(model.config)) == kinds


def loaded(model: Any, folder: Path) -> None:
    if not load_converted(model, read_saved(folder)):
        model.load_state_dict(load_file(folder / WEIGHTS), strict=False)


@every_family
def test_a_whole_checkpoint_passes_and_a_model_of_the_original_size_takes_it_over(
    family: Family, tmp_path: Path
) -> None:
    small, model = saved(family, tmp_path), family.build()
    verify_checkpoint(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    assert fit_to_checkpoint(model, read_saved(tmp_path), optimizer)
    loaded(model, tmp_path)
    assert torch.equal(outputs(model, family.batch()), outputs(small, family.batch()))
    assert model.config.to_dict() == small.config.to_dict()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert not fit_to_checkpoint(model, read_saved(tmp_path), optimizer)
    train_step(model, optimizer, family.batch())


@pytest.mark.parametrize("family", [MAMBA, MAMBA2], ids=family_id)
def test_a_checkpoint_of_the_own_class_and_one_of_the_stock_class_are_taken_in_turn(
    family: Family, tmp_path: Path
) -> None:
    own, stock, model = saved(family, tmp_path / "own", **UNEVEN), family.build(seed=2), family.build()
    stock.save_pretrained(tmp_path / "stock")
    for name, other in (("own", own), ("stock", stock), ("own", own)):
        verify_checkpoint(tmp_path / name)
        assert fit_to_checkpoint(model, read_saved(tmp_path / name))
        loaded(model, tmp_path / name)
        assert (type(model), type(model.config)) == (type(other), type(other.config))
        assert torch.equal(outputs(model, family.batch()), outputs(other, family.batch()))


@some_families
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"model_type": 3}'], ids=lambda content: repr(content)
)
def test_a_config_that_is_none_is_named(family: Family, content: bytes, folder_of: Callable) -> None:
    folder = folder_of(family)
    (folder / "config.json").write_bytes(content)
    refused(family, folder, r"config\.json")


@some_families
def test_a_truncated_config_is_named(family: Family, folder_of: Callable) -> None:
    folder = folder_of(family)
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(content[: len(content) // 2])
    refused(family, folder, r"config\.json")


BAD_SIZES = [0, -4, 4.0, 0.5, "4", True, False, None, [4], {"a": 4}, 10**9, 10**30]


@some_families
@pytest.mark.parametrize("size", BAD_SIZES, ids=repr)
def test_a_state_size_that_is_none_is_named(family: Family, size: Any, folder_of: Callable) -> None:
    folder = folder_of(family)
    edit(folder, **{family.size_field: size})
    refused(family, folder, rf"config\.json.*({family.size_field}|weights|describe)")


@some_families
@pytest.mark.parametrize("size", [1, 2, 3, 5, STATE_SIZE, 17, 100])
def test_a_state_size_that_the_tensors_do_not_have_is_named(family: Family, size: int, folder_of: Callable) -> None:
    folder = folder_of(family)
    edit(folder, **{family.size_field: size})
    refused(family, folder, r"config\.json")


PER_LAYER: dict[str, Any] = {
    "unknown layer": {"7": {"state_size": 4}},
    "negative layer": {"-1": {"state_size": 4}},
    "layer in words": {"first": {"state_size": 4}},
    "layer with markup": {"<script>": {"state_size": 4}},
    "size of zero": {"0": {"state_size": 0}},
    "size in words": {"0": {"state_size": "four"}},
    "fraction": {"0": {"state_size": 2.5}},
    "switch": {"0": {"state_size": True}},
    "huge": {"0": {"state_size": 10**12}},
    "a number": {"0": 4},
    "null": {"0": None},
    "a list": [{"state_size": 4}],
    "a text": "state_size",
    "at odds": {"1": {"state_size": 2}},
    "unknown field": {"0": {"nonsense": 1}},
}


@pytest.mark.parametrize("family", [LRU, S5], ids=family_id)
@pytest.mark.parametrize("per_layer", PER_LAYER.values(), ids=PER_LAYER)
def test_sizes_per_layer_that_are_none_are_named(family: Family, per_layer: Any, folder_of: Callable) -> None:
    folder = folder_of(family)
    edit(folder, per_layer_config=per_layer)
    refused(family, folder, r"config\.json")


OTHER_VALUES: dict[str, dict[str, Any]] = {
    "no layers": {"num_hidden_layers": 0},
    "fewer layers": {"num_hidden_layers": 1},
    "more layers": {"num_hidden_layers": 3},
    "huge number of layers": {"num_hidden_layers": 10**9},
    "layers in words": {"num_hidden_layers": "two"},
    "hidden size": {"hidden_size": 12},
    "hidden size of zero": {"hidden_size": 0},
    "hidden size in words": {"hidden_size": "six"},
    "unknown model type": {"model_type": "nonsense"},
    "model type that is a list": {"model_type": ["mamba"]},
    "no model type": {"model_type": None},
    "another family's model type": {"model_type": "bert"},
}


@pytest.mark.parametrize("family", [LRU, MAMBA, MAMBA2], ids=family_id)
@pytest.mark.parametrize("values", OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_a_config_that_describes_another_model_is_refused(family: Family, values: dict, folder_of: Callable) -> None:
    folder = folder_of(family)
    edit(folder, **values)
    refused(family, folder, str(folder))


@some_families
@pytest.mark.parametrize(
    "architectures",
    [
        None,
        [],
        [""],
        [None],
        [3],
        ["Trainer"],
        ["__name__"],
        ["pipeline"],
        ["BertModel"],
        ["PreTrainedModel"],
        ["adopt"],
        ["Nonsense"],
        ["../x"],
        "MambaForCausalLM",
        {"0": "MambaForCausalLM"},
    ],
    ids=str,
)
def test_architectures_that_name_no_class_of_the_model_are_named(
    family: Family, architectures: Any, folder_of: Callable
) -> None:
    folder = folder_of(family)
    edit(folder, architectures=architectures)
    with pytest.raises(ValueError, match=r"config\.json"):
        verify_checkpoint(folder)


@some_families
def test_a_record_of_a_newer_version_is_refused(family: Family, folder_of: Callable) -> None:
    folder = folder_of(family)
    record = json.loads((folder / "config.json").read_text())["compressm"]
    edit(folder, compressm=record | {"schema_version": 99})
    refused(family, folder, r"config\.json.*schema_version 99.*Upgrade")


@some_families
@pytest.mark.parametrize("record", [3, [], "x", {}, {"schema_version": 1}, {"schema_version": None}], ids=str)
def test_a_record_that_is_none_is_refused(family: Family, record: Any, folder_of: Callable) -> None:
    folder = folder_of(family)
    edit(folder, compressm=record)
    refused(family, folder, r"config\.json.*compressm")


def layer_tensor(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith((".D", ".A_log")))


@some_families
def test_a_tensor_that_a_layer_lacks_is_named(family: Family, folder_of: Callable) -> None:
    folder = folder_of(family)
    edit_weights(folder, lambda tensors: tensors.__delitem__(layer_tensor(tensors)))
    refused(family, folder, r"has no tensor .*\.(D|A_log)")


@some_families
def test_a_tensor_that_a_layer_does_not_have_is_named(family: Family, folder_of: Callable) -> None:
    folder = folder_of(family)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[layer_tensor(tensors).rpartition(".")[0] + ".extra"] = torch.zeros(3)

    edit_weights(folder, add)
    refused(family, folder, r"has a tensor .*\.extra")


@some_families
def test_a_tensor_of_another_shape_is_named(family: Family, folder_of: Callable) -> None:
    folder = folder_of(family)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = layer_tensor(tensors)
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    edit_weights(folder, widen)
    refused(family, folder, r"at odds with the weights.*\.(D|A_log)")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\x08\0\0\0\0\0\0\0{}      "], ids=["empty", "zeros", "none"])
def test_weights_without_tensors_are_refused(content: bytes, folder_of: Callable) -> None:
    folder = folder_of(LRU)
    (folder / WEIGHTS).write_bytes(content)
    refused(LRU, folder, str(folder))


@pytest.mark.parametrize("other", BROKEN_FAMILIES, ids=family_id)
@pytest.mark.parametrize("family", BROKEN_FAMILIES, ids=family_id)
def test_a_checkpoint_of_another_family_is_refused(family: Family, other: Family, folder_of: Callable) -> None:
    if family is not other:
        refused(family, folder_of(other), rf"{type(family.build()).__name__}", whole_by_itself=True)


@pytest.mark.parametrize("family", [LRU, MAMBA, MAMBA2], ids=family_id)
@pytest.mark.parametrize("other", [{"num_hidden_layers": 3}, {"hidden_size": 12}, {"vocab_size": 17}], ids=str)
def test_a_checkpoint_of_a_model_with_other_dimensions_is_refused(family: Family, other: dict, tmp_path: Path) -> None:
    if family is MAMBA2 and "hidden_size" in other:
        other = {"hidden_size": 32, "num_heads": 8}
    family.build(**other).save_pretrained(tmp_path)
    verify_checkpoint(tmp_path)
    refused(family, tmp_path, str(tmp_path), whole_by_itself=True)


def test_a_model_that_is_none_of_transformers_is_left_alone(folder_of: Callable) -> None:
    model = torch.nn.Linear(2, 2)
    assert not fit_to_checkpoint(model, read_saved(folder_of(LRU)))


def test_nothing_of_a_checkpoint_is_run_as_code(folder_of: Callable) -> None:
    folder = folder_of(LRU)
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    edit(folder, auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"})
    verify_checkpoint(folder)
    fit_to_checkpoint(LRU.build(), read_saved(folder))
