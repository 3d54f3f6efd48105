import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, GenerationMixin

from tests.caches import cache_of
from tests.models.cases import FAMILIES, LRU, enable_checkpointing, tokens
from tests.models.cases_mamba import MAMBA_FAMILIES


TOLERANCE = 1e-5  # float32: a recurrence step by step against the scan of the whole sequence

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
PER_LAYER = {"per_layer_config": {"0": {"state_size": 4}}}


@pytest.mark.parametrize("family", [*FAMILIES, *MAMBA_FAMILIES], ids=lambda family: family.name)
def test_the_class_itself_names_the_mixin_of_generation(family):
    """transformers looks among the direct bases, in its common tests and where a class becomes custom code."""
    assert GenerationMixin in family.causal_class.__bases__
    assert family.causal_class.can_generate()


@families
def test_cached_logits_equal_those_of_the_whole_sequence(family):
    model, x = family.causal_model(**PER_LAYER), tokens()
    expected = model(x).logits
    outputs = model(x[:, :4], use_cache=True)
    logits = [outputs.logits]
    for k in range(4, 9):
        outputs = model(x[:, k : k + 1], cache=outputs.cache)
        logits.append(outputs.logits)
    assert_close(torch.cat(logits, dim=1), expected, rtol=TOLERANCE, atol=TOLERANCE)


@families
@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generation_with_and_without_a_cache_agrees(family, strategy):
    model, x = family.causal_model(**PER_LAYER), tokens(2, 5)
    sequences = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        sequences.append(model.generate(x, max_new_tokens=6, use_cache=use_cache, pad_token_id=0, **strategy))
    assert_close(sequences[0], sequences[1])
    assert sequences[0].shape[1] == 11


@families
def test_generation_costs_one_token_per_step(family, monkeypatch):
    model, x = family.causal_model(), tokens(2, 5)
    lengths = []
    model.backbone.register_forward_hook(lambda _, __, outputs: lengths.append(outputs[0].shape[1]))
    outputs = model.generate(x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert lengths == [5, 1, 1, 1]
    assert cache_of(outputs).layers[0].recurrent_states[0].shape[0] == 2


@families
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_does_not_change_what_is_generated(family, use_cache):
    model, lengths, rows = family.causal_model(), [7, 3], tokens(2, 7)
    padded = torch.stack([row.roll(7 - length) for row, length in zip(rows, lengths, strict=True)])
    mask = (torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]).long()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    batched = model.generate(padded, attention_mask=mask, **settings)
    for row, length, generated in zip(rows, lengths, batched, strict=True):
        assert_close(generated[7:], model.generate(row[None, :length], **settings)[0, length:])


@families
def test_generation_continues_from_a_cache_and_from_embeddings(family):
    model, x = family.causal_model(), tokens(2, 6)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(x, **settings)[:, 6:]
    cache = DynamicCache(config=model.config)
    model(x[:, :4], cache=cache)
    mask = torch.ones(2, 6, dtype=torch.long)  # may cover what the cache holds
    continued = model.generate(x[:, 4:], cache=cache, attention_mask=mask, **settings)
    assert_close(continued[:, 2:], expected)
    embeddings = model.get_input_embeddings()(x)
    assert_close(model.generate(inputs_embeds=embeddings, **settings), expected)


@families
def test_a_stale_cache_is_refused_with_both_sizes(family):
    old, new, x = family.causal_model(), family.causal_model(**PER_LAYER), tokens()
    cache = old(x, use_cache=True).cache
    sizes = old.backbone.layers[0].ssm.slots, new.backbone.layers[0].ssm.slots
    with pytest.raises(ValueError, match=f"holds {sizes[0]} states for layer 0, but the layer now has {sizes[1]}"):
        new(x, cache=cache)
    with pytest.raises(ValueError, match="holds 3 sequences at layer 0, but the input has 1"):
        old(x[:1], cache=cache)
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model\.config\)"):
        old(x, cache=DynamicCache())
    with pytest.raises(ValueError, match="pass its cache as `cache`"):
        old(x, past_key_values=cache)
    enable_checkpointing(old)
    with pytest.raises(ValueError, match="cannot be used with gradient checkpointing"):
        old.train()(x, cache=cache)


def test_a_reset_cache_starts_over():
    model, x = LRU.causal_model(), tokens()
    cache = model(x, use_cache=True).cache
    cache.reset()
    assert_close(model(x, cache=cache).logits, model(x).logits, rtol=0, atol=0)


def test_the_cache_goes_by_its_older_name_too():
    model, x = LRU.causal_model(), tokens()
    outputs = model(x[:, :4], use_cache=True)
    assert "cache_params" in outputs
    assert outputs.cache_params is outputs["cache_params"] is outputs.cache
    assert list(outputs) == ["logits", "cache"]
    assert "cache_params" not in model(x, use_cache=False)
    expected = model(x).logits[:, 4:]
    for runs in (model, lambda x, **cache: model.lm_head(model.backbone(x, **cache).last_hidden_state)):
        cache = copy.deepcopy(outputs.cache)
        logits = runs(x[:, 4:], cache_params=cache)
        assert_close(getattr(logits, "logits", logits), expected, rtol=TOLERANCE, atol=TOLERANCE)
    model(x, cache=cache, cache_params=cache)
    with pytest.raises(ValueError, match="pass one, as `cache`"):
        model(x, cache=cache, cache_params=outputs.cache)


def test_gradients_stop_at_the_cache():
    model, x = LRU.causal_model(), tokens()
    first = model(x, use_cache=True)
    second = model(x, cache=first.cache)
    (first.logits.sum() + second.logits.sum()).backward()
    assert not first.cache.layers[0].recurrent_states[0].requires_grad
