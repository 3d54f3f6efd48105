"""Associative recall in a stream: a task whose accuracy depends on how many associations the state can hold.

A sequence shows pairs of a key and its value, `k1 v1 k2 v2 ...`. Keys are drawn again and again, and within a sequence
a key always has the same value; which one is drawn anew for every sequence. The value of a key that was shown before
is a question, and only these are scored. Since some questions come soon after the key and some late, a model learns
this in fewer steps than where all pairs come before all questions (multi-query associative recall, arXiv 2312.04927).
"""

import torch
from torch import Tensor


IGNORED = -100
"""The label of a position that is not scored, as in `transformers`."""


def recall_examples(count: int, keys: int, values: int, shown: int, seed: int) -> dict[str, Tensor]:
    """Draw sequences of `2 * shown` tokens; keys are tokens 0 .. keys - 1, values come behind them.

    Args:
        count: of sequences.
        keys: in the vocabulary, so many associations the state has to hold.
        values: in the vocabulary.
        shown: pairs in each sequence, more than one.
        seed: of the draw.

    Returns:
        `input_ids` and `labels`, int64 `(count, 2 * shown)`; labels are `IGNORED` but at the values of keys that were
        shown before.

    Raises:
        ValueError: if there would be nothing to ask.
    """
    if min(keys, values) < 1 or shown < 2:
        raise ValueError(f"Recall needs keys, values and two pairs; got keys={keys}, values={values}, shown={shown}.")
    generator = torch.Generator().manual_seed(seed)
    value_of = torch.randint(0, values, (count, keys), generator=generator) + keys
    drawn = torch.randint(0, keys, (count, shown), generator=generator)
    answers = value_of.gather(1, drawn)
    before = (drawn[:, :, None] == drawn[:, None, :]).tril(-1).any(dim=2)
    input_ids = torch.stack([drawn, answers], dim=2).flatten(1)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, 1::2] = answers.where(before, IGNORED)
    return {"input_ids": input_ids, "labels": labels}
