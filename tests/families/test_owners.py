"""Who owns a layer: the configuration with its size, counted and named within the part of the model it describes."""

import copy
from typing import Any

import pytest
from torch import nn
from transformers import MambaModel, PreTrainedModel

from hf_compressm.families import find_layers
from hf_compressm.models import LRUModel
from tests.family_table import (
    Family,
    each,
    family_id,
)
from tests.own_modules import (
    Around,
    Pair,
    PairConfig,
    Twins,
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


def owned(model: nn.Module) -> list[tuple[str | None, int]]:
    """Name of the owner's module and index, for every layer."""
    return [(layer.owner and layer.owner.name, layer.index) for layer in find_layers(model)]


@pytest.mark.parametrize("family", each(), ids=family_id)
def test_a_plain_model_owns_all_its_layers(family: Family) -> None:
    model = family.build()
    layers = find_layers(model)
    assert {id(layer.owner) for layer in layers} == {id(layers[0].owner)}
    assert layers[0].owner.module is model
    assert layers[0].owner.configs == (model.config,)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (around_mamba, [("bb", 0), ("bb", 1)]),
        (two_mambas, [("fwd", 0), ("fwd", 1), ("bwd", 0), ("bwd", 1)]),
        (own_mixers, [("mixers.0", 0), ("mixers.1", 0)]),
        (own_layers, [(None, 0), (None, 1)]),
        (llava, [("", 0), ("", 2)]),
        (pair, [("", 0), ("", 1), ("", 0), ("", 1)]),
        (lambda: Around(list=nn.ModuleList([LRUModel(lru_config())] * 1)), [("list.0", 0), ("list.0", 1)]),
    ],
)
def test_layers_are_counted_within_the_part_that_their_configuration_describes(build: Any, expected: list) -> None:
    assert owned(build()) == expected


def test_two_configurations_inside_one_are_two_owners() -> None:
    model = pair()
    owners = [layer.owner for layer in find_layers(model)]
    assert owners[0] is owners[1]
    assert owners[2] is owners[3]
    assert owners[0] is not owners[2]
    assert owners[0].configs == (model.config.left_config,)


def test_one_configuration_of_two_backbones_is_one_owner_if_it_is_that_of_the_whole() -> None:
    inside = seeded(lambda: Twins(lru_config()))
    assert len({id(layer.owner) for layer in find_layers(inside)}) == 1
    assert [layer.index for layer in find_layers(inside)] == [0, 1, 0, 1]
    config = mamba_config()
    beside = Around(fwd=MambaModel(config), bwd=MambaModel(config))
    assert [name for name, _ in owned(beside)] == ["fwd", "fwd", "bwd", "bwd"]


def test_an_equal_copy_of_a_configuration_belongs_to_the_same_owner() -> None:
    """As in VisionTextDualEncoderModel, whose text model has the configuration of the whole; its backbone has not."""
    model = pair()
    for part in model.left.modules():
        if "config" in vars(part):
            part.config = copy.deepcopy(model.config.left_config)
    owner = find_layers(model)[0].owner
    assert owner.module is model
    assert [id(config) for config in owner.configs[-1:]] == [id(model.config.left_config)]
    assert owner.configs[0] is not model.config.left_config


class Distilled(PreTrainedModel):
    """A student with the configuration of the whole, and a teacher with an equal one of its own."""

    config_class = type(lru_config())

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.student, self.teacher = LRUModel(config), LRUModel(copy.deepcopy(config))
        self.post_init()


def test_an_equal_configuration_is_no_copy_of_one_that_another_part_holds() -> None:
    model = Distilled(lru_config())
    assert owned(model) == [("", 0), ("", 1), ("teacher", 0), ("teacher", 1)]


def test_of_two_equal_copies_none_is_taken_for_the_layers_own() -> None:
    model = pair(8, 8)
    for side in (model.left, model.right):
        side.config = copy.deepcopy(side.config)
    assert {name for name, _ in owned(model)} == {"left", "right"}


class Direct(PreTrainedModel):
    """A composite model that builds an own layer beside the part that its inner configuration describes."""

    config_class = PairConfig

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        self.inside = Pair(config)
        self.beside = own_layers((8,))
        self.post_init()


def test_a_layer_beside_a_part_is_not_owned_by_the_configuration_of_that_part() -> None:
    model = Direct(PairConfig(left_config=lru_config(), right_config=lru_config()))
    names = {layer.name: layer.owner for layer in find_layers(model)}
    assert names["beside.layers.0"] is None
    assert names["inside.left.layers.0.ssm"].module is model


def test_a_model_whose_configuration_has_no_size_owns_nothing() -> None:
    assert {name for name, _ in owned(plain())} == {"bb.bb"}
