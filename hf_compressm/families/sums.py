"""What calibration batches show about a layer: the interface of the sums that families take."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_compressm.families.calls import Example, Seen
from hf_compressm.utils.devices import summing_dtype


class Statistics(ABC):
    """What calibration batches show about a layer; sums from other processes can be added.

    Attributes:
        sums: tensors summed over batches, by name, float64 on the CPU; `calls` and `tokens` are among them.
        samples: rows of signals by name, one tensor for every time that some were kept.
        told_apart: whether the layer was told which texts of a packed row are apart, if its family listens to that.
        obstacle: why nothing can be measured of a layer that ran, or "".
        keeps_examples: whether inputs of the layer are kept, for trying cuts on them.
        examples: these inputs, of this process.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.keeps_examples = False
        self.examples: list[Example] = []
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {}
        self.told_apart = True
        self.obstacle = ""
        self._call: dict[str, Tensor] = {}  # sums of the present call, on the layer's device
        self._rows: list[tuple[str, Tensor, Tensor | None]] = []  # samples of the present call, and which ones count

    @property
    def tokens(self) -> int:
        """Number of tokens seen, without padding."""
        return int(self.sums["tokens"]) if "tokens" in self.sums else 0

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor to the sum of that name; inside `update` only."""
        value = value.detach().to(summing_dtype(value.device))
        self._call[name] = self._call[name] + value if name in self._call else value

    def keep_rows(self, name: str, rows: Tensor, real: Tensor | None = None) -> None:
        """Add rows to the samples of that name; inside `update` only.

        Args:
            name: of the samples.
            rows: `(rows, ...)`.
            real: `(rows,)`, 1 for the rows that count, and 0 for those that stand in for rows that there are not: how
                many there are is not known before the copy. None if all count.
        """
        self._rows.append((name, rows.detach(), real))

    def mean(self, name: str) -> Tensor:
        """The sum of that name, divided by the number of tokens."""
        return self.sums[name] / max(self.tokens, 1)

    @property
    def problem(self) -> str:
        """Why nothing was seen, or ""."""
        if self.obstacle:
            return self.obstacle
        if "calls" not in self.sums:
            return "the calibration did not run through it"
        return "" if self.tokens else "the calibration holds nothing but padding"

    def shortage(self, size: int) -> str:
        """Why too little was seen to tell how many of `size` states matter, or ""."""
        if self.tokens >= size:
            return ""
        return (
            f"{self.tokens} calibration token(s) cannot rank {size} states; take at least as many tokens as states "
            "(more or longer batches, or a larger calibration_batches)"
        )

    def observe(self, seen: Seen) -> None:
        """Take in one forward call of the layer, and move its sums and samples to the CPU in one copy."""
        self._call, self._rows = {}, []
        self.update(seen)
        call, rows = self._call, self._rows
        self._call, self._rows = {}, []
        if not call:
            return
        call["calls"] = torch.ones_like(call["tokens"])
        parts = [*call.values(), *(part for _, *both in rows for part in both if part is not None)]
        moved = iter(_moved(parts, call["tokens"].dtype))
        for name in call:
            total = next(moved)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        for name, given, real in rows:
            kept = next(moved).to(torch.promote_types(given.dtype, torch.float32))
            kept = kept if real is None else kept[next(moved) > 0]
            self.samples.setdefault(name, []).append(kept)

    @abstractmethod
    def update(self, seen: Seen) -> None:
        """Add up what one forward call of the layer shows, `tokens` among it; or set `obstacle` and add nothing."""


def _moved(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one device in float64 on the CPU, moved in one copy, and as `dtype` until then."""
    flat = torch.cat([part.flatten().to(dtype) for part in parts]).cpu().double()
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)]
