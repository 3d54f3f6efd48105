"""Compressed models, and what every way out of this package has to agree with: their own outputs."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, compress
from tests.family_table import Family


SIZES = [(3, 9), (1, 1), (2, 70), (1, 33)]
"""(batch, length) that no example had: a single step, both sides of a chunk, several chunks."""


def compressed(family: Family, kept: int = 4, **kwargs: Any) -> PreTrainedModel:
    """A model of the family, cut to `kept` of its 8 states."""
    model = family.build(**kwargs)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    compress(model, CompreSSMConfig(target_state_size=kept), calibration=family.calibration())
    assert getattr(model.config, family.size_field) == kept
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} != before
    return model


def inputs_of(family: Family, batch_size: int, length: int, masked: bool = False) -> dict[str, Tensor]:
    """Inputs without labels; with `masked` also a mask that pads the first row on the left."""
    inputs = {key: value for key, value in family.batch(batch_size, length).items() if key != "labels"}
    if masked:
        inputs["attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
        inputs["attention_mask"][0, : length // 3] = 0
    return inputs


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits
