"""What the kernels of `selective_triton.py` compute of one time step for their channels, in float32.

Pointers are those of a segment of a sequence: `t` counts from its first step, and `steps` of them are in the sequence.
Rows lie (step, channel), with the channels side by side.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with a relative error of 1e-7 everywhere.

    log1p(e) is 2 artanh(e / (2 + e)), and e = exp(-|x|) is in 0 .. 1: eight terms of the series are enough.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    series = series * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def is_inside(t, c, steps, channels):
    """`(c < channels) & (t < steps)`, in a form that Triton's interpreter can use as a mask, too."""
    return tl.where(c < channels, t, steps) < steps


@triton.jit
def row(pointer, t, c, steps, channels):
    """Entries (t, c) of a tensor; 0 outside of the sequence."""
    return tl.load(pointer + t * channels + c, mask=is_inside(t, c, steps, channels), other=0.0).to(tl.float32)


@triton.jit
def step_size(delta, bias, t, c, steps, channels, SOFTPLUS: tl.constexpr):
    """The step size, and what it was before softplus; outside of the sequence it is 0, which changes no state."""
    raw = row(delta, t, c, steps, channels) + bias
    if SOFTPLUS:
        size = softplus(raw)
    else:
        size = raw
    return tl.where(is_inside(t, c, steps, channels), size, 0.0), raw


@triton.jit
def gated(grad, z, t, c, steps, channels, HAS_Z: tl.constexpr):
    """The gradient before the gate from that after it."""
    if HAS_Z:
        gate = row(z, t, c, steps, channels)
        grad *= gate * sigmoid(gate)
    return grad


@triton.jit
def tile(
    u,
    delta,
    z,
    grad_out,
    bias,
    first,
    c,
    steps,
    channels,
    TILE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """Step sizes, inputs, and gradients before the gate, of TILE steps from the first one on."""
    sizes = ()
    values = ()
    grads = ()
    for k in tl.static_range(TILE):
        size, _ = step_size(delta, bias, first + k, c, steps, channels, SOFTPLUS)
        sizes += (size,)
        values += (row(u, first + k, c, steps, channels),)
        grads += (gated(row(grad_out, first + k, c, steps, channels), z, first + k, c, steps, channels, HAS_Z),)
    return sizes, values, grads


@triton.jit
def gate_slope(gate):
    """The derivative of silu."""
    share = sigmoid(gate)
    return share * (1.0 + gate * (1.0 - share))


@triton.jit
def vector(pointer, c, channels, HAS: tl.constexpr):
    """Entries c of a vector; 0 outside of it, and where there is none."""
    if HAS:
        value = tl.load(pointer + c, mask=c < channels, other=0.0).to(tl.float32)
    else:
        value = tl.zeros_like(c).to(tl.float32)
    return value
