"""What `generate()` and pipelines do with a cut model; `tests/models` does the same for models that were not cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_compressm.models import S5ForSequenceClassification
from tests.exporting.cases import compressed, inputs_of, logits_of
from tests.family_table import LRU, MAMBA, MAMBA2, NUM_LABELS, S5, VOCAB_SIZE, Family, family_id, token_batch


TOLERANCE = 1e-5  # float32: a recurrence step by step against the scan of the whole sequence
WORDS = "abcdefghijklm"[:VOCAB_SIZE]
TEXTS = ["d f c j", "e", "h h k"]


def labelled_texts(*args: int, **kwargs: int) -> dict[str, Tensor]:
    batch = token_batch(*args, **kwargs)
    return {**batch, "labels": batch["labels"][:, 0] % NUM_LABELS}


S5_TEXT_CLASSIFIER = Family(
    "s5-text",
    "s5",
    S5ForSequenceClassification,
    S5.config_class,
    {"num_labels": NUM_LABELS, "vocab_size": VOCAB_SIZE, "input_size": None},
    labelled_texts,
)

families = pytest.mark.parametrize("family", [MAMBA, MAMBA2, S5, LRU], ids=family_id)


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """One token per letter; a is padding, b ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="c"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="a",
        eos_token="b",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def without_spaces(text: str) -> str:
    """Pipelines join prompt and continuation without one."""
    return text.replace(" ", "")


def generated(model: Any, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(3)
    mask = torch.ones_like(tokens) if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(tokens, attention_mask=mask, **options)


@families
@pytest.mark.parametrize(
    "strategy",
    [{}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}],
    ids=str,
)
def test_a_cut_model_generates_the_same_with_and_without_its_cache(family, strategy):
    model, tokens = compressed(family), inputs_of(family, 2, 5)["input_ids"]
    with_cache, without = (generated(model, tokens, use_cache=use_cache, **strategy) for use_cache in (True, False))
    assert torch.equal(with_cache, without)
    assert with_cache.shape[1] == 11


@families
def test_left_padding_changes_neither_logits_nor_what_is_generated(family):
    model, inputs = compressed(family), inputs_of(family, 2, 9, masked=True)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    together = generated(model, tokens, mask)
    logits = logits_of(model, inputs)
    for row in range(2):
        alone = tokens[row : row + 1, mask[row].bool()]
        assert_close(logits[row, mask[row].bool()], model(alone).logits[0], rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.equal(together[row, 9:], generated(model, alone)[0, alone.shape[1] :])
    assert not mask.all()


@families
def test_a_pipeline_writes_what_generate_does(family):
    model, tokenizer = compressed(family), tokenizer_of_words()
    options = {"max_new_tokens": 4, "do_sample": False}
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    alone = [writer(text, **options)[0]["generated_text"] for text in TEXTS]
    in_batch = [texts[0]["generated_text"] for texts in writer(TEXTS, batch_size=3, **options)]
    expected = []
    for text in TEXTS:
        encoded = tokenizer(text, return_tensors="pt")
        sequence = model.generate(**encoded, **options, pad_token_id=0)[0]
        expected.append(without_spaces(tokenizer.decode(sequence, skip_special_tokens=True)))
    assert [without_spaces(text) for text in alone] == expected
    assert [without_spaces(text) for text in in_batch] == expected
    prompts = [without_spaces(text) for text in TEXTS]
    assert all(text.startswith(prompt) for text, prompt in zip(expected, prompts, strict=True))
    assert expected != prompts


def test_a_pipeline_classifies_as_the_cut_model_does():
    model, tokenizer = compressed(S5_TEXT_CLASSIFIER), tokenizer_of_words()
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = logits_of(model, dict(encoded)).softmax(-1)
    for scores, row in zip(classifier(TEXTS, batch_size=3), expected, strict=True):
        found = {entry["label"]: entry["score"] for entry in scores}
        assert_close(torch.tensor([found[model.config.id2label[k]] for k in range(NUM_LABELS)]), row)


@pytest.mark.parametrize("family", [MAMBA, S5, S5_TEXT_CLASSIFIER], ids=family_id)
def test_a_directory_of_safetensors_is_the_cut_model(family: Family, tmp_path: Path) -> None:
    model = compressed(family)
    model.save_pretrained(tmp_path)
    tokenizer_of_words().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert stored.items() <= shapes.items()
    assert stored

    auto_class = AutoModelForCausalLM if family.name != "s5-text" else AutoModelForSequenceClassification
    loaded, tokenizer = auto_class.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
