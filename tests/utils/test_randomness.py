"""What runs undisturbed leaves no trace in generators, modes and configurations."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from hf_compressm.utils.configurations import configurations
from hf_compressm.utils.randomness import undisturbed
from tests.own_modules import around_mamba, llava, pair


@pytest.mark.parametrize("build", [around_mamba, llava, pair], ids=lambda build: build.__name__)
def test_every_configuration_of_a_model_is_as_before(build: Any) -> None:
    model = build().train()
    before = [(config, dict(vars(config))) for config in configurations(model)]
    assert len(before) == {"around_mamba": 1}.get(build.__name__, 3)
    with undisturbed(model):
        assert not model.training
        for config, _ in before:
            config.problem_type = "regression"
            config.hidden_size = -1
    assert all(vars(config) == values for config, values in before)
    assert model.training


def test_generators_are_as_before() -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with undisturbed():
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_an_attribute_that_is_no_configuration_is_left_alone() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = dict
    with undisturbed(model):
        pass
    assert model.config is dict
    assert configurations(model) == []
