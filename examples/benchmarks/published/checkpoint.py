"""What all rows of `published_table.py` share, and one trained model that is to be cut."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cut_arms import lacking
from published.arms import Arm
from published.measures import Harness
from published.recovery import Recovery
from published.texts import Texts, tokens_of, windows
from rows import Results
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_compressm.families import find_layers


DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What all cells share.

    Attributes:
        texts: to calibrate, train and test on.
        data: name of the texts.
        length: of windows in tokens.
        samples: windows of the calibration.
        calibration_batch: windows of it at once.
        test_batch: windows of the test at once.
        seed: of the calibration's windows, the random arm, and the order of recovery.
        dtype: of the weights.
        harness: tasks.
        recovery: training after a cut.
        results: where rows are written.
        output: folder of the results.
    """

    texts: Texts
    data: str
    length: int
    samples: int
    calibration_batch: int
    test_batch: int
    seed: int
    dtype: torch.dtype
    harness: Harness
    recovery: Recovery
    results: Results
    output: Path

    def settings(self, step: int) -> dict[str, Any]:
        """What decides the figures after a step of recovery, as it stands in every row."""
        names = ("data", "length", "samples", "calibration_batch", "seed")
        given = {name: getattr(self, name) for name in names} | {"dtype": str(self.dtype)}
        tasks = {"tasks": list(self.harness.tasks), "limit": self.harness.limit}
        return {**given, **tasks, **({"training": self.recovery.training} if step else {})}


class Checkpoint:
    """A trained model that is to be cut.

    Args:
        name: its id on the Hub, or its folder.
        options: of all cells.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without its weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.name))

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return AutoTokenizer.from_pretrained(self.name)

    @cached_property
    def train(self) -> Tensor:
        """Tokens of the training text."""
        return tokens_of(self.tokenizer, self.options.texts.train)

    @cached_property
    def test(self) -> Tensor:
        """Windows of the test text."""
        return windows(tokens_of(self.tokenizer, self.options.texts.test), self.options.length)

    @property
    def states(self) -> int:
        """States of its layers.

        Raises:
            ValueError: for a model without layers to cut.
        """
        sizes = [layer.state_size for layer in find_layers(self.skeleton)]
        if not sizes:
            raise ValueError(f"{self.name} has no layer that this package cuts.")
        return max(sizes)

    def lacking(self, arm: Arm) -> str:
        """Why an arm cannot cut it, or ""."""
        return lacking(arm, self.skeleton)

    def load(self, folder: Path | None = None) -> PreTrainedModel:
        """The model on the device, or what has become of it in a folder."""
        return AutoModelForCausalLM.from_pretrained(folder or self.name, dtype=self.options.dtype).to(DEVICE).eval()
