"""The short causal convolution before a scan, per channel: fast on a CPU, and within packed texts.

    y_t = b + sum over j of w_j x_{t - J + 1 + j}, j = 0 ... J - 1        out_t = activation(y_t)

Glossary:

| symbol     | meaning                                                              | shape                        |
|------------|----------------------------------------------------------------------|------------------------------|
| x          | input                                                                | (batch, channels, length)    |
| w, b       | weights of the J taps, the last of which is that of the step itself  | (channels, J), (channels,)   |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ssd import text_starts


BLOCK_ENTRIES = 1 << 18  # entries worked on at once, which fit into the cache
ACTIVATIONS = (None, "silu", "swish")


class _CausalConvolution(torch.autograd.Function):
    """The convolution and SiLU in blocks of steps; keeps nothing but its arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_activated: bool) -> Tensor:
        """X (batch, length, channels), weight (channels, J), bias (channels,) -> out, as x."""
        ctx.save_for_backward(x, weight, bias)
        ctx.is_activated = is_activated
        taps, out = weight.T.contiguous(), torch.empty_like(x)
        for row, steps in _blocks(x):
            y = _convolved(x[row], steps, taps, bias)
            out[row, steps] = F.silu(y, inplace=True) if is_activated else y
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias, from y computed again."""
        x, weight, bias = ctx.saved_tensors
        taps = weight.T.contiguous()
        grad_x, grad_taps, grad_bias = torch.zeros_like(x), torch.zeros_like(taps), torch.zeros_like(taps[0])
        for row, steps in _blocks(x):
            grad_y = grad_out[row, steps]
            if ctx.is_activated:
                grad_y = torch.ops.aten.silu_backward(grad_y, _convolved(x[row], steps, taps, bias))
            for lag, tap in enumerate(taps.flip(0)):
                own, earlier = _reached(steps, lag)
                grad_x[row, earlier].addcmul_(grad_y[own], tap)
                grad_taps[-1 - lag] += (grad_y[own] * x[row, earlier]).sum(0)
            if bias is not None:
                grad_bias += grad_y.sum(0)
        return grad_x, grad_taps.T, None if bias is None else grad_bias, None


def causal_convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Causal convolution of `(batch, channels, length)` by `(channels, taps)`, with the steps side by side in memory.

    A layout with the channels side by side, as a projection leaves them, is worked on as it is. Differentiable once.

    Args:
        hidden_states: x, (batch, channels, length), float32 or float64.
        weight: (channels, taps), in the dtype of `hidden_states`.
        bias: (channels,).
        activation: "silu" or its other name "swish", or none.

    Returns:
        (batch, channels, length), with the channels side by side in memory.
    """
    x = hidden_states.transpose(1, 2).contiguous()
    return _CausalConvolution.apply(x, weight, bias, activation is not None).transpose(1, 2)


def is_fast_convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> bool:
    """Whether `causal_convolution` takes these arguments: one dtype of 32 or 64 bits, and SiLU or nothing after it."""
    dtypes = {tensor.dtype for tensor in (hidden_states, weight, bias) if tensor is not None}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and activation in ACTIVATIONS


def packed_convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seq_idx: Tensor,
) -> Tensor:
    """Causal convolution of `(batch, channels, length)` by `(channels, taps)` within texts, as the kernel does it.

    Steps from a cache may come before those of `seq_idx`: they belong to the first text of their row.
    """
    length, taps = hidden_states.shape[-1], weight.shape[-1]
    text = F.pad(text_starts(seq_idx).cumsum(1), (length - seq_idx.shape[1], 0))
    inputs = hidden_states.to(weight.dtype)
    out = torch.zeros_like(inputs) if bias is None else bias[:, None].expand_as(inputs)
    for lag in range(min(taps, length)):
        is_same = text[:, lag:] == text[:, : length - lag]
        term = weight[:, taps - 1 - lag, None] * inputs[..., : length - lag] * is_same[:, None]
        out = out + F.pad(term, (lag, 0))
    return out.to(hidden_states.dtype)


def _blocks(x: Tensor) -> list[tuple[int, slice]]:
    """Rows of x and blocks of their steps, of about BLOCK_ENTRIES entries."""
    batch, length, channels = x.shape
    steps = max(1, BLOCK_ENTRIES // channels)
    return [(row, slice(s, min(s + steps, length))) for row in range(batch) for s in range(0, length, steps)]


def _convolved(x: Tensor, steps: slice, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Some steps of y, from all of x (length, channels) and the taps (J, channels)."""
    y = x[steps] * taps[-1]
    if bias is not None:
        y += bias
    for lag in range(1, taps.shape[0]):
        own, earlier = _reached(steps, lag)
        y[own].addcmul_(x[earlier], taps[-1 - lag])
    return y


def _reached(steps: slice, lag: int) -> tuple[slice, slice]:
    """Those of a block's steps that have a step `lag` before them, counted in the block, and the steps before."""
    first = min(max(steps.start, lag), steps.stop)
    return slice(first - steps.start, None), slice(max(first - lag, 0), max(steps.stop - lag, 0))
