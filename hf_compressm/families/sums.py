"""What calibration batches show about a layer: the interface of the sums that families take."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hf_compressm.families.calls import Example, Seen
from hf_compressm.utils.dtypes import summing_dtype


class Statistics(ABC):
    """What calibration batches show about a layer; sums from other processes can be added.

    Attributes:
        sums: tensors summed over batches, by name, float64 on the CPU; `calls` and `tokens` are among them.
        samples: rows of signals by name, one tensor per batch.
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

    @property
    def tokens(self) -> int:
        """Number of tokens seen, without padding."""
        return int(self.sums["tokens"]) if "tokens" in self.sums else 0

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor to the sum of that name; inside `update` only."""
        value = value.detach().to(summing_dtype(value.device))
        self._call[name] = self._call[name] + value if name in self._call else value

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
        """Take in one forward call of the layer, and move its sums to the CPU in one copy."""
        self._call = {}
        self.update(seen)
        call, self._call = self._call, {}
        if not call:
            return
        call["calls"] = torch.ones_like(call["tokens"])
        flat = torch.cat([value.flatten() for value in call.values()]).to("cpu", torch.float64)
        pieces = flat.split([value.numel() for value in call.values()])
        for (name, value), piece in zip(call.items(), pieces, strict=True):
            total = piece.view(value.shape)
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    @abstractmethod
    def update(self, seen: Seen) -> None:
        """Add up what one forward call of the layer shows, `tokens` among it; or set `obstacle` and add nothing."""
