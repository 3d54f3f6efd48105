"""Associative recall in a stream: a task whose accuracy depends on how many associations the state can hold.

A sequence shows pairs of a key and its value, `k1 v1 k2 v2 ...`. Keys are drawn again and again, and within a sequence
a key always has the same value; which one is drawn anew for every sequence. The value of a key that was shown before
is a question, and only these are scored. Two things let a model learn this in few steps, where multi-query associative
recall (arXiv 2312.04927), all pairs before all questions, takes many: some questions come soon after the key and some
late, and in training some sequences have few different keys.
"""

import torch
from torch import Tensor


IGNORED = -100
"""The label of a position that is not scored, as in `transformers`."""


def recall_examples(
    count: int, keys: int, values: int, shown: int, seed: int, fewest: int | None = None
) -> dict[str, Tensor]:
    """Draw sequences of `2 * shown` tokens; keys are tokens 0 .. keys - 1, values come behind them.

    Args:
        count: of sequences.
        keys: in the vocabulary, so many associations the state has to hold.
        values: in the vocabulary.
        shown: pairs in each sequence, more than one.
        seed: of the draw.
        fewest: each sequence has a number of different keys drawn from this one to `keys`; by default all have `keys`.

    Returns:
        `input_ids` and `labels`, int64 `(count, 2 * shown)`; labels are `IGNORED` but at the values of keys that were
        shown before.

    Raises:
        ValueError: if there would be nothing to ask.
    """
    fewest = keys if fewest is None else fewest
    if min(fewest, values) < 1 or shown < 2 or fewest > keys:
        raise ValueError(
            "Recall needs values >= 1, shown >= 2 and 1 <= fewest <= keys; got "
            f"values={values}, shown={shown}, fewest={fewest}, keys={keys}."
        )
    generator = torch.Generator().manual_seed(seed)
    value_of = torch.randint(0, values, (count, keys), generator=generator) + keys
    numbers = torch.randint(fewest, keys + 1, (count, 1), generator=generator)
    mixed = torch.rand(count, keys, generator=generator).argsort(dim=1)
    drawn = mixed.gather(1, (torch.rand(count, shown, generator=generator) * numbers).long())
    answers = value_of.gather(1, drawn)
    before = (drawn[:, :, None] == drawn[:, None, :]).tril(-1).any(dim=2)
    input_ids = torch.stack([drawn, answers], dim=2).flatten(1)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, 1::2] = answers.where(before, IGNORED)
    return {"input_ids": input_ids, "labels": labels}
