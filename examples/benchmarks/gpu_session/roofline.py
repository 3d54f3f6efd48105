"""The least time that the Triton kernels of the selective scan can take: what the device could issue, and move.

The scan is four passes over (batch, length, channels, N): `local` and `forward`, and for the gradients `retrace` and
`backward`. A pass takes as long as its instructions, or its special functions (the exponential), whichever is longer:

    seconds = batch * length * channels * N * max(instructions / (SMs * clock * 128), special / (SMs * clock * 16))

since an SM starts 4 instructions for 32 lanes, and 16 special functions, per cycle (*CUDA C++ Programming Guide*,
"Arithmetic Instructions", compute capability 8.0 and 9.0). The whole is the sum of the passes, or the bytes moved over
the memory's bandwidth, whichever is longer.

Sources: instructions and special functions per state and step were counted in the machine code of the inner loops that
Triton 3.8 made for compute capability 9.0, in bfloat16 (local and forward 8 steps by 128 channels, retrace 4 by 128,
backward 4 by 128 up to 32 states and 8 by 64 above); backward for 8.0 likewise (4 by 64), its other passes are taken
to be as for 9.0. Bandwidths are those of NVIDIA's data sheets. Clocks are 1.755 GHz for Hopper, which the cards exceed
when they run cool (at most 1.98), and 1.41 for Ampere. The number of SMs is read from the device.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        clock: cycles per second.
        bandwidth: of its memory, bytes per second.
    """

    clock: float
    bandwidth: float


CARDS = {
    "NVIDIA H100 80GB HBM3": Card(1.755e9, 3.35e12),
    "NVIDIA H200": Card(1.755e9, 4.8e12),
    "NVIDIA A100-SXM4-80GB": Card(1.41e9, 2.039e12),
    "NVIDIA A100-SXM4-40GB": Card(1.41e9, 1.555e12),
}
"""By the name that the driver gives; other cards have no share of a roofline."""

LANES, SPECIAL_LANES = 128, 16
"""Of an SM, per cycle."""

LOCAL, FORWARD, RETRACE = (4.8, 1.0), (6.8, 1.0), (9.8, 1.25)
"""Instructions and special functions per state and step."""
LONG_STATES = 32
"""Above so many states the backward pass holds more steps and fewer channels, for its scratch goes as 1 / steps."""
SEGMENT = 128
"""Steps between two states that are kept."""


def backward(size: int, capability: int) -> tuple[float, float, int]:
    """Instructions and special functions of the backward pass, and the steps that it holds at once."""
    if capability < 9:
        return 30.1, 1.0, 4
    return (22.1, 1.0, 4) if size <= LONG_STATES else (27.9, 1.0, 8)


def least_milliseconds(shape: tuple[int, int, int], size: int, device: Any) -> tuple[float, float] | None:
    """Of the forward pass alone, and of forward and backward pass together.

    Args:
        shape: batch, channels, length; in bfloat16, with a gate.
        size: N.
        device: what `torch.cuda.get_device_properties` returns.

    Returns:
        Two times, or None for a card whose clock and bandwidth are not in `CARDS`.
    """
    card = CARDS.get(device.name)
    if card is None:
        return None
    entries = shape[0] * shape[1] * shape[2]
    states, rate = entries * size, device.multi_processor_count * card.clock

    def seconds(instructions: float, special: float) -> float:
        return states * max(instructions / (rate * LANES), special / (rate * SPECIAL_LANES))

    instructions, special, tile = backward(size, device.major)
    forward = seconds(*LOCAL) + seconds(*FORWARD)
    both = forward + seconds(*RETRACE) + seconds(instructions, special)
    # Of every entry: u, delta, z, out and their gradients, two bytes each, some of them read twice; kept states, four
    # bytes each, written and read by several passes; and the backward pass's states of every tile, which stay in the
    # cache where there are few, and its scratch of B and C.
    kept = 4 * states / SEGMENT
    scratch = states * (36 if size > LONG_STATES else 8) / tile
    forward_bytes, both_bytes = 12 * entries + 4 * kept, 34 * entries + 10 * kept + scratch
    return 1e3 * max(forward, forward_bytes / card.bandwidth), 1e3 * max(both, both_bytes / card.bandwidth)
