"""The selective scan as Triton kernels: time proportional to the number of states, and the same bits in every run.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        out_t = (C_t . h_t + D u_t) silu(z_t)

| symbol      | meaning                                              | shape                             |
|-------------|------------------------------------------------------|-----------------------------------|
| u, delta, z | input, step size before bias and softplus, gate      | (batch, length, D)                |
| rates       | A / log 2: decays are powers of two                  | (N, D)                            |
| B, C        | float32, zeros at the end up to whole segments       | (batch, N, segments * SEGMENT)    |
| starts      | states before each segment                           | (batch, segments, N, D)           |
| spans       | sums of the step sizes of each segment               | (batch, segments, D)              |

A program, one warp, owns BLOCK channels of one segment of one sequence. It goes through chunks of TILE steps: what
belongs to a step and a channel stays in registers while a loop passes over the states, which reads and writes one
number for each channel. So N may be any number, and only sums over channels need other threads: they are written by
block of channels, and added here, without atomic operations.

| kernel   | does                                                            | exponentials per state and step |
|----------|-----------------------------------------------------------------|---------------------------------|
| local    | last state of each segment from zero; not for one segment       | 1                               |
| carry    | first state of each segment, from one segment to the next       | 1 / SEGMENT                     |
| forward  | out                                                             | 1                               |
| retrace  | state before each chunk, and what a segment adds to its adjoint | 1 + 1 / TILE                    |
| carry    | adjoint after each segment, from the last to the first          | 1 / SEGMENT                     |
| backward | all gradients                                                   | 1                               |

Only features of Triton 3.5 are used, and no `range`, about which NumPy 2.4 and the interpreter of 3.5 disagree.
`selective_kernel.py` imports this file if Triton is installed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .operators import like
from .selective_triton_backward import backward_kernel, retrace_kernel
from .selective_triton_forward import carry_kernel, forward_kernel, local_kernel


LOG2_E = 1.4426950408889634
SEGMENT = 128  # steps that run one after the other, while other programs have the other segments
CARRY_BLOCK = 128
SCRATCH_ENTRIES = 1 << 29  # float32 numbers that a backward pass writes down on its way, 2 GiB
FEW_STATES = 32  # up to this many, the states between chunks stay in the cache however short the chunks are


class Tiles(NamedTuple):
    """Steps and channels of a program: as many as its registers hold."""

    steps: int
    channels: int


FORWARD = Tiles(8, 128)
BACKWARD = Tiles(4, 128)
BACKWARD_MANY_STATES = Tiles(8, 64)
BACKWARD_ELSEWHERE = Tiles(4, 64)  # where the others spill registers


def backward_tiles(capability: tuple[int, int] | None, state_size: int) -> Tiles:
    """What fits into the registers of a GPU; `capability` is None where it is not one of NVIDIA's."""
    if capability is None or capability[0] not in (9, 10):
        return BACKWARD_ELSEWHERE
    return BACKWARD if state_size <= FEW_STATES else BACKWARD_MANY_STATES


class _Given(NamedTuple):
    """The arguments as the kernels take them; see the glossary of this file."""

    u: Tensor
    delta: Tensor
    rates: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Length, number of channels, number of states."""
        return self.u.shape[1], self.u.shape[2], self.rates.shape[0]

    def of(self, rows: slice) -> _Given:
        """Some sequences of the batch."""
        z = None if self.z is None else self.z[rows]
        return self._replace(u=self.u[rows], delta=self.delta[rows], B=self.B[rows], C=self.C[rows], z=z)

    def options(self, tiles: Tiles, softplus: bool, *optional: str) -> dict[str, Any]:
        """What a kernel is compiled for; `optional` names the arguments that it has and that may be None."""
        has = {f"HAS_{name.upper()}": getattr(self, name) is not None for name in ("bias", *optional)}
        sizes = {"SEGMENT": SEGMENT, "TILE": tiles.steps, "BLOCK": tiles.channels}
        return {**sizes, **has, "SOFTPLUS": softplus, "num_warps": 1}


def selective_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan.

    Args:
        u: (batch, length, D), float32, bfloat16 or float16, as all that follow may be, and with any strides.
        delta: (batch, length, D).
        A: (D, N).
        B: (batch, N, length).
        C: (batch, N, length).
        D: (D,).
        z: (batch, length, D).
        bias: (D,).
        softplus: whether step sizes pass through softplus, after the bias.

    Returns:
        out, (batch, length, D) in the dtype of u; in float32 the last state (batch, N, D), and `starts`.
    """
    given = _prepare(u, delta, A, B, C, D, z, bias)
    length, channels, state_size = given.sizes
    batch, segments = u.shape[0], triton.cdiv(length, SEGMENT)
    new = functools.partial(torch.empty, dtype=torch.float32, device=u.device)
    starts, last = new(batch, segments, state_size, channels), new(batch, state_size, channels)
    ends, out = torch.empty_like(starts), torch.empty_like(given.u)
    grid = triton.cdiv(channels, FORWARD.channels), segments, batch
    with torch.cuda.device_of(u):  # Triton launches on the current device, wherever the tensors are
        if segments > 1:
            spans = new(batch, segments, channels)
            local_kernel[grid](
                *(given.u, given.delta, given.rates, given.B, given.bias, starts, spans, *given.sizes),
                **given.options(FORWARD, softplus),
            )
            _carry(starts, spans, given.rates, None, last)
        else:
            starts.zero_()
        forward_kernel[grid](*given, starts, ends, out, *given.sizes, **given.options(FORWARD, softplus, "D", "z"))
    return out, (last if segments > 1 else ends[:, 0]), starts


def selective_backward(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    starts: Tensor,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, z and bias, in their dtypes, from those of out and of the last state.

    The gradient of a tensor that is None has no entries. Sequences are taken a few at a time, so that what the kernels
    write down on their way fits into SCRATCH_ENTRIES.
    """
    given = _prepare(u, delta, A, B, C, D, z, bias)
    length, channels, state_size = given.sizes
    batch, tiles = u.shape[0], backward_tiles(_capability(u.device), state_size)
    grad_out = torch.zeros_like(given.u) if grad_out is None else grad_out.contiguous()
    grad_last = starts.new_zeros(batch, state_size, channels) if grad_last is None else grad_last.contiguous()
    found = like(u, delta, A, B, C, D, z, bias)
    by_step = (found[0], found[1], found[6] if z is not None else found[0])
    sums = [starts.new_zeros(size) for size in ((state_size, channels), (channels,), (channels,))]
    scratch = starts[0].numel() * (SEGMENT // tiles.steps) + 2 * given.B[0].numel() * triton.cdiv(
        channels, tiles.channels
    )
    at_once = max(1, SCRATCH_ENTRIES // scratch)
    for rows in (slice(first, min(first + at_once, batch)) for first in range(0, batch, at_once)):
        grads = grad_out[rows], grad_last[rows]
        parts = _run_back(given.of(rows), grads, starts[rows], [x[rows] for x in by_step], softplus, tiles)
        for target, part in ((found[3], parts.B), (found[4], parts.C)):
            target[rows] = part.sum(0)[..., :length]
        for total, part in zip(sums, (parts.A, parts.D, parts.bias), strict=True):
            total += part.sum((0, 1))
    found[2].copy_(sums[0].T)
    for target, total in ((found[5], sums[1]), (found[7], sums[2])):
        if target.numel():
            target.copy_(total)
    return found


class _Parts(NamedTuple):
    """Gradients that are still to be added up."""

    A: Tensor  # (batch, segments, N, D)
    B: Tensor  # (blocks, batch, N, segments * SEGMENT)
    C: Tensor
    D: Tensor  # (batch, segments, D)
    bias: Tensor


def _run_back(
    given: _Given,
    grads: tuple[Tensor, Tensor],
    starts: Tensor,
    by_step: list[Tensor],
    softplus: bool,
    tiles: Tiles,
) -> _Parts:
    """Run the kernels of the backward pass for some sequences: fill the gradients of u, delta and z in `by_step`."""
    grad_out, grad_last = grads
    batch, segments, state_size, channels = starts.shape
    blocks = triton.cdiv(channels, tiles.channels)
    new = starts.new_empty
    states = new(batch, segments * (SEGMENT // tiles.steps), state_size, channels)
    adjoints, spans = torch.empty_like(starts), new(batch, segments, channels)
    parts = _Parts(
        torch.empty_like(starts),
        *(new(blocks, *vectors.shape) for vectors in (given.B, given.C)),
        *(torch.empty_like(spans) for _ in range(2)),
    )
    grid = blocks, segments, batch
    u, delta, rates, B, C, _, z, bias = given
    with torch.cuda.device_of(u):
        retrace_kernel[grid](
            *(u, delta, rates, B, C, z, bias, grad_out, starts, states, adjoints, spans, *given.sizes),
            **given.options(tiles, softplus, "z"),
        )
        _carry(adjoints, spans, rates, grad_last, torch.empty_like(grad_last))
        backward_kernel[grid](
            *(*given, grad_out, states, adjoints, *by_step, *parts, *given.sizes),
            **given.options(tiles, softplus, "D", "z"),
        )
    return parts


def _carry(parts: Tensor, spans: Tensor, rates: Tensor, initial: Tensor | None, last: Tensor) -> None:
    """Go from segment to segment, in place: forward from zero, or backward from `initial`."""
    batch, segments, state_size, channels = parts.shape
    grid = triton.cdiv(state_size * channels, CARRY_BLOCK), batch
    has_initial = initial is not None
    tensors = parts, spans, rates, initial, last
    carry_kernel[grid](
        *tensors, segments, channels, state_size, BLOCK=CARRY_BLOCK, REVERSED=has_initial, HAS_INITIAL=has_initial
    )


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
) -> _Given:
    """The arguments in the layouts of the kernels."""
    rates = (A.float() * LOG2_E).T.contiguous()
    B, C = (F.pad(vectors.float(), (0, -u.shape[1] % SEGMENT)).contiguous() for vectors in (B, C))
    D, z, bias = (None if tensor is None else tensor.contiguous() for tensor in (D, z, bias))
    return _Given(u.contiguous(), delta.contiguous(), rates, B, C, D, z, bias)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of one of NVIDIA's GPUs."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else None
