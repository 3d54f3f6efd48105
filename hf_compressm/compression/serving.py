"""What a model's recurrent state costs where it is served: bytes for each sequence and for each token.

| word | meaning |
|---|---|
| recurrent state | what the recurrence of an SSM layer carries from token to token, in a dtype of its own |
| convolution's state | the inputs that a layer's causal convolution still needs: channels times (taps - 1) |
| scale | one float32 for each row of N states, where the recurrent state has one byte for each state |

Keys and values of attention layers are no part of it: they grow with the length, and a cut does not change them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_compressm.compression.plan import CompressionPlan, LayerPlan
from hf_compressm.families import SSMLayer, find_layers


STATE_BYTES = {"float32": 4, "16 bits": 2, "8 bits": 1}
"""Bytes of one state, by what engines offer for the recurrent state: float32, bfloat16 or float16, int8 or float8."""

CONVOLUTION_BYTES = 2
"""Engines keep the convolution's state in the dtype of the activations, also beside a quantised recurrent state."""

SCALE_BYTES = 4
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class StateCost:
    """What decoding keeps of one sequence, all SSM layers together.

    Attributes:
        states: real numbers in the recurrent state.
        rows: rows of N states, each of which has a scale where states are quantised.
        convolved: real numbers in the state of the convolutions.
    """

    states: int
    rows: int
    convolved: int

    def recurrent_bytes(self, width: int) -> int:
        """Bytes of the recurrent state at `width` bytes for each state; one byte needs scales too."""
        return self.states * width + (self.rows * SCALE_BYTES if width == 1 else 0)

    @property
    def convolution_bytes(self) -> int:
        """Bytes of the convolution's state."""
        return self.convolved * CONVOLUTION_BYTES

    def sequences(self, memory: int, width: int) -> int:
        """Number of sequences whose states fit into `memory` bytes together."""
        return memory // max(self.recurrent_bytes(width) + self.convolution_bytes, 1)

    def moved_bytes(self, width: int) -> int:
        """Bytes that a token of one sequence moves: all state is read once and written once."""
        return 2 * (self.recurrent_bytes(width) + self.convolution_bytes)

    def to_dict(self, memory: int) -> dict[str, Any]:
        """JSON-ready dict: for each width of a state, bytes, sequences in `memory` bytes, and bytes for each token."""
        return {
            name: {
                "state_bytes": self.recurrent_bytes(width),
                "convolution_bytes": self.convolution_bytes,
                "sequences": self.sequences(memory, width),
                "bytes_per_token": self.moved_bytes(width),
            }
            for name, width in STATE_BYTES.items()
        }


def state_cost(model: nn.Module, plan: CompressionPlan | None = None) -> StateCost:
    """What one sequence's state costs in all SSM layers, now or after a planned cut that still has its tensors."""
    plans: Mapping[str, LayerPlan] = {} if plan is None else {layer.name: layer for layer in plan.layers}
    costs = [_layer_cost(layer, plans.get(layer.name)) for layer in find_layers(model)]
    return StateCost(*(sum(parts) for parts in zip(*costs, strict=True)))


def memory_bytes(text: str) -> int:
    """The bytes that a text such as `40GiB`, `80 GB` or `1000000` stands for.

    Raises:
        ValueError: for any other text.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ValueError(f"memory must be a number of bytes with a unit, such as 40GiB or 80GB, got {text!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


def _layer_cost(layer: SSMLayer, plan: LayerPlan | None) -> tuple[int, int, int]:
    """States, rows and convolved inputs of one layer."""
    present = layer.family.state_entries(layer.module)
    size = layer.state_size if plan is None else plan.new_state_size
    return present * size // layer.state_size, present // layer.state_size, _convolved(layer.module, plan)


def _convolved(module: nn.Module, plan: LayerPlan | None) -> int:
    """Inputs that the causal depthwise convolutions of a layer hold, with their width after a planned cut."""
    changes = () if plan is None or plan.cut is None else plan.cut.changes
    widths = {id(change.parameter): change.value.shape[0] for change in changes}
    convolutions = [each for each in module.modules() if isinstance(each, nn.Conv1d) and each.groups > 1]
    return sum(
        widths.get(id(each.weight), each.out_channels) * (math.prod(each.kernel_size) - 1) for each in convolutions
    )
