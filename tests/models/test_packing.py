"""Rows of several texts: every text comes out as if it were alone, and nothing passes from one to the next."""

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.models.cases import FAMILIES, LRU, S5, VOCAB_SIZE, enable_checkpointing, perturbed, tokens


TOLERANCE = 1e-5  # the same float32 sums in chunks that begin elsewhere
TEXTS = (4, 1, 7, 2)
LENGTH = sum(TEXTS)

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def seq_idx(texts=TEXTS):
    return torch.repeat_interleave(torch.arange(len(texts), dtype=torch.int32) % 2, torch.tensor(texts))[None]


def position_ids(texts=TEXTS):
    return torch.cat([torch.arange(length) for length in texts])[None]


def boundaries(texts=TEXTS):
    return torch.tensor([0, *texts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


WAYS = {
    "seq_idx": lambda: {"seq_idx": seq_idx()},
    "cu_seq_lens": lambda: {"cu_seq_lens_q": boundaries(), "cu_seq_lens_k": boundaries(), "max_length_q": max(TEXTS)},
    "position_ids": lambda: {"position_ids": position_ids()},
    "positions from 2": lambda: {"position_ids": position_ids() + 2},
    "all": lambda: {"seq_idx": seq_idx(), "cu_seq_lens_q": boundaries(), "position_ids": position_ids()},
}


def backbone(family, **fields):
    return perturbed(family.model_class(family.config(vocab_size=VOCAB_SIZE, **fields)), 0.3).eval()


def one_by_one(model, row, texts=TEXTS):
    return torch.cat([model(text, use_cache=False).last_hidden_state for text in row.split(texts, dim=1)], dim=1)


@families
@pytest.mark.parametrize("way", WAYS)
def test_every_text_is_as_if_alone(family, way):
    model, row = backbone(family), tokens(1, LENGTH)
    outputs = model(row, **WAYS[way](), output_hidden_states=True)
    expected = one_by_one(model, row)
    assert_close(outputs.last_hidden_state, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert [states.shape for states in outputs.hidden_states] == [expected.shape] * 3
    assert_close(outputs.hidden_states[0], model.embeddings(row))
    assert outputs.cache is None
    assert (model(row).last_hidden_state - expected).abs().max() > 100 * TOLERANCE


def test_both_directions_stay_in_the_text():
    model, row = backbone(S5, bidirectional=True), tokens(1, LENGTH)
    expected = one_by_one(model, row)
    assert_close(model(row, seq_idx=seq_idx()).last_hidden_state, expected, rtol=TOLERANCE, atol=TOLERANCE)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_other_texts_and_padding(family, side):
    model = backbone(family)
    rows, texts = tokens(3, LENGTH), [TEXTS, (LENGTH,), (1, 3, 8)]
    expected = [one_by_one(model, row[None, : sum(own)], own) for row, own in zip(rows, texts, strict=True)]
    index = torch.stack([torch.nn.functional.pad(seq_idx(own)[0], (0, LENGTH - sum(own)), value=-1) for own in texts])
    mask = torch.ones_like(rows)
    mask[2, 12:] = 0
    if side == "left":
        rows[2], mask[2], index[2] = (tensor[2].roll(LENGTH - 12) for tensor in (rows, mask, index))
    actual = model(rows, attention_mask=mask, seq_idx=index).last_hidden_state
    for out, kept, alone in zip(actual, mask.bool(), expected, strict=True):
        assert_close(out[kept], alone[0], rtol=TOLERANCE, atol=TOLERANCE)


@families
def test_padding_is_no_text(family, monkeypatch):
    """Positions of padded rows do not increase in the padding either: no row is taken apart for that."""
    model, x = backbone(family), tokens(2, 9)
    seen = []
    forward = type(model.layers[0].ssm).forward
    monkeypatch.setattr(
        type(model.layers[0].ssm),
        "forward",
        lambda self, u, *rest, **named: seen.append(u) or forward(self, u, *rest, **named),
    )
    for mask in (torch.tensor([[0] * 4 + [1] * 5, [1] * 9]), torch.tensor([[1] * 4 + [0] * 5, [1] * 9])):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as transformers makes them
        expected = model(x, attention_mask=mask)
        actual = model(x, attention_mask=mask, position_ids=positions)
        assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
        assert actual.cache is not None
    assert {u.shape[:2] for u in seen} == {(2, 9)}


@families
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_training_on_packed_texts_is_training_on_padded_ones(family, norm):
    model = family.causal_class(family.config(vocab_size=VOCAB_SIZE, norm=norm)).train()
    features = [{"input_ids": row.tolist()} for length in TEXTS for row in tokens(1, length)]
    padded = torch.zeros(len(TEXTS), max(TEXTS), dtype=torch.long)
    mask = (torch.arange(max(TEXTS)) < torch.tensor(TEXTS)[:, None]).long()
    padded[mask.bool()] = torch.tensor([token for feature in features for token in feature["input_ids"]])
    labels = padded.masked_fill(mask == 0, -100)

    def results(**inputs):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = results(input_ids=padded, attention_mask=mask, labels=labels)
    flat = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)(features)
    assert flat["input_ids"].shape == (1, LENGTH)
    assert_close(results(**flat), expected, rtol=TOLERANCE, atol=TOLERANCE)
    only_positions = {name: flat[name] for name in ("input_ids", "labels", "position_ids")}
    assert_close(results(**only_positions), expected, rtol=TOLERANCE, atol=TOLERANCE)
    enable_checkpointing(model)
    assert_close(results(**flat), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("column", ["position_ids", "seq_idx"])
def test_a_dataset_that_is_packed_already(column, tmp_path):
    """The Trainer passes on the columns that `forward` names, and drops the others."""
    index = position_ids() if column == "position_ids" else seq_idx()
    labels = tokens(1, LENGTH)
    labels[:, boundaries()[:-1].long()] = -100
    row = {"input_ids": tokens(1, LENGTH)[0].tolist(), "labels": labels[0].tolist(), column: index[0].tolist()}
    model = LRU.causal_model()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list([row]))
    (batch,) = trainer.get_train_dataloader()
    assert set(batch) == {"input_ids", "labels", column}
    expected = one_by_one(model.backbone, batch["input_ids"])
    assert_close(model(**batch).logits, model.lm_head(expected), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_batch_of_trl_without_padding():
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    model = LRU.causal_model()
    rows = [row.tolist() for length in TEXTS for row in tokens(1, length)]
    collator = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": row} for row in rows])
    losses = [
        model(torch.tensor([row]), labels=torch.tensor([row]), num_items_in_batch=1).loss for row in rows if row[1:]
    ]
    assert_close(model(**batch, num_items_in_batch=1).loss, sum(losses), rtol=TOLERANCE, atol=TOLERANCE)


@families
def test_a_classifier_pools_the_row(family):
    model = family.classifier_class(family.config(vocab_size=VOCAB_SIZE, pooling="mean")).eval()
    row = tokens(1, LENGTH)
    expected = model.score(one_by_one(model.backbone, row).mean(dim=1))
    assert_close(model(row, seq_idx=seq_idx()).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_does_not_fit_is_named():
    model, row = backbone(LRU), tokens(1, LENGTH)
    cache = model(row, use_cache=True).cache
    mistakes = [
        ({"seq_idx": seq_idx()[:, 1:]}, r"`seq_idx` has shape \(1, 13\); the input needs \(1, 14\)"),
        ({"position_ids": torch.zeros(3, 1, LENGTH)}, r"`position_ids` has shape \(3, 1, 14\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 9])}, r"`cu_seq_lens_q` is \[0, 3, 9\] and the input \(1, 14\)"),
        ({"seq_idx": seq_idx(), "cache": cache}, "Got `cache` and rows of several texts"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(ValueError, match=message):
            model(row, **arguments)
    assert model(row[:, :1], cache=cache, position_ids=torch.tensor([[LENGTH]])).cache is cache
    two = model(tokens(2, LENGTH), position_ids=position_ids()).last_hidden_state  # one row of positions for all
    assert two.shape == (2, LENGTH, 6)
