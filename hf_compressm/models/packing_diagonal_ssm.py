"""Texts that are packed into one row: each runs in a row of its own, so that no state passes from one to the next.

Whatever holds for padded rows then holds for packed ones: both directions, batch norm, statistics of the layers. It
takes the time and memory of a batch of these texts padded to the longest.

Glossary:
    text    consecutive steps of a row that belong together; a row that is not packed is one text
    starts  True at the first step of every text but a row's first, (batch, length)
    mask    True at positions that are not padding, (batch, length)
"""

from typing import Any

import torch


class PackedTexts:
    """The texts of packed rows, and the way from rows to texts and back.

    Args:
        starts: `(batch, length)`.
    """

    def __init__(self, starts: torch.Tensor):
        first = starts.clone()
        first[:, 0] = True
        step = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        self.text = first.flatten().cumsum(0).view_as(first) - 1  # (batch, length), counted over all rows
        self.offset = step - torch.where(first, step, 0).cummax(dim=1).values
        self.shape = int(self.text[-1, -1]) + 1, int(self.offset.max()) + 1

    def apart(self, rows: torch.Tensor) -> torch.Tensor:
        """`(batch, length, ...)` as `(texts, longest text, ...)`, with zeros after each text."""
        texts = rows.new_zeros(*self.shape, *rows.shape[2:])
        return texts.index_put((self.text, self.offset), rows)

    def together(self, texts: torch.Tensor) -> torch.Tensor:
        """The inverse of `apart`."""
        return texts[self.text, self.offset]


def find_packed_texts(
    shape: torch.Size, mask: torch.Tensor | None, device: torch.device, given: dict[str, torch.Tensor | None]
) -> PackedTexts | None:
    """The texts in rows of `shape` `(batch, length)`, or None where every row is one text.

    Args:
        shape: `(batch, length)`.
        mask: `(batch, length)`; padding begins no text, whatever the arguments hold there.
        device: Of the model's inputs.
        given: Arguments of a model's `forward`. The first of these that is there decides: `seq_idx` `(batch, length)`,
            which changes from text to text; `cu_seq_lens_q` `(texts + 1,)`, the places where texts begin in a single
            row and its length; `position_ids` `(batch, length)` or `(1, length)`, which do not increase where a text
            begins.

    Raises:
        ValueError: When the deciding argument has another shape.
    """
    starts = _find_starts(shape, given)
    if starts is None:
        return None
    starts = starts.to(device)
    if mask is not None:
        starts = starts & mask & (mask.cumsum(1) > 1)
    return PackedTexts(starts) if starts.any() else None


def _find_starts(shape: torch.Size, given: dict[str, torch.Tensor | None]) -> torch.Tensor | None:
    seq_idx, boundaries = given.get("seq_idx"), given.get("cu_seq_lens_q")
    position_ids = given.get("position_ids")
    if seq_idx is not None:
        if seq_idx.shape != shape:
            raise ValueError(f"`seq_idx` has shape {tuple(seq_idx.shape)}; the input needs {tuple(shape)}.")
        return _before_differs(seq_idx, torch.ne)
    if boundaries is not None:
        if shape[0] != 1 or boundaries.ndim != 1 or boundaries[-1] != shape[1]:
            raise ValueError(
                f"`cu_seq_lens_q` is {boundaries.tolist()} and the input {tuple(shape)}; it belongs to one row, and "
                "ends with its length. Pass `seq_idx` for several rows."
            )
        starts = torch.zeros(shape, dtype=torch.bool, device=boundaries.device)
        starts[0, boundaries[1:-1].long()] = True
        return starts
    if position_ids is None:
        return None
    if position_ids.shape not in (shape, (1, shape[1])):
        raise ValueError(f"`position_ids` has shape {tuple(position_ids.shape)}; the input needs {tuple(shape)}.")
    return _before_differs(position_ids.expand(shape), torch.le)


def _before_differs(values: torch.Tensor, differs: Any) -> torch.Tensor:
    """Whether `differs(value, value before)`, False at the first step of a row."""
    return torch.nn.functional.pad(differs(values[:, 1:], values[:, :-1]), (1, 0))
