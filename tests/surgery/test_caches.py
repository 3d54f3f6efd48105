"""A cache from before a cut is refused in so many words, and generation goes on."""

from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress
from tests.caches import as_cache, cache_of
from tests.family_table import (
    LANGUAGE_MODELS,
    MAMBA,
    MAMBA2,
    Family,
    each,
    family_id,
    ssm_layers,
    token_batch,
)


language_model = pytest.mark.parametrize("family", each(LANGUAGE_MODELS), ids=family_id)
GENERATION = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def filled(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """The cache after a prompt, under the name by which the model takes it."""
    with torch.no_grad():
        return {**as_cache(model, cache_of(model(tokens, use_cache=True))), "use_cache": True}


@language_model
def test_a_cache_of_the_old_size_is_refused_with_both_sizes_and_generation_works(family: Family) -> None:
    model = family.build()
    tokens = token_batch(2, 5)["input_ids"]
    stale = filled(model, tokens)
    compress(model, CompreSSMConfig(target_state_size=4), family.calibration())
    sizes = rf"\b{8 // family.granularity}\b.*\b{4 // family.granularity}\b"
    with pytest.raises(ValueError, match=sizes), torch.no_grad():
        model(tokens[:, -1:], **stale)
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GENERATION)
    assert generated.shape == (2, 9)
    with torch.no_grad():
        model(tokens[:, -1:], **filled(model, tokens))


@pytest.mark.parametrize("family", [MAMBA, MAMBA2], ids=family_id)
def test_the_own_classes_refuse_a_stale_cache_too(family: Family) -> None:
    model = family.build()
    tokens = token_batch(2, 5)["input_ids"]
    stale = filled(model, tokens)
    compress(model, CompreSSMConfig(target_state_size=4, compat="best"), family.calibration())
    with pytest.raises(ValueError, match=r"\b8\b.*\b4\b"), torch.no_grad():
        model(tokens[:, -1:], **stale)
    assert model.generate(tokens, attention_mask=torch.ones_like(tokens), **GENERATION).shape == (2, 9)


def test_a_layer_looks_at_its_cache_once_however_often_it_is_cut() -> None:
    model = MAMBA.build()
    for size in (6, 4, 2):
        compress(model, CompreSSMConfig(target_state_size=size), MAMBA.calibration())
    assert [len(layer._forward_pre_hooks) for layer in ssm_layers(model).values()] == [1, 1]
