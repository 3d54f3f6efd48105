"""The kernels of the selective scan that run forward; `selective_triton.py` says how they work together."""

import triton
import triton.language as tl

from .selective_triton_steps import row, sigmoid, step_size, vector


@triton.jit(do_not_specialize=["length", "state_size"])
def local_kernel(
    u,
    delta,
    rates,
    B,
    bias,
    ends,
    spans,
    length,
    channels,
    state_size,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`ends`: the last state of each segment from zero, (batch, segments, N, D); `spans`: its sum of step sizes."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    padded = tl.num_programs(1) * SEGMENT
    place = sequence * tl.num_programs(1) + segment
    steps = length - segment * SEGMENT
    first_row = (sequence * length + segment * SEGMENT) * channels
    u += first_row
    delta += first_row
    B += sequence * state_size * padded + segment * SEGMENT
    ends += place * state_size * channels
    exists = c < channels
    shift = vector(bias, c, channels, HAS_BIAS)
    span = tl.zeros_like(shift)
    first = 0
    while first < SEGMENT:
        sizes = ()
        drives = ()
        for k in tl.static_range(TILE):
            size, _ = step_size(delta, shift, first + k, c, steps, channels, SOFTPLUS)
            sizes += (size,)
            drives += (size * row(u, first + k, c, steps, channels),)
            span += size
        n = 0
        while n < state_size:
            rate = tl.load(rates + n * channels + c, mask=exists, other=0.0)
            h = tl.load(ends + n * channels + c, mask=exists & (first > 0), other=0.0)
            for k in tl.static_range(TILE):
                h = tl.exp2(sizes[k] * rate) * h + drives[k] * tl.load(B + n * padded + first + k)
            tl.store(ends + n * channels + c, h, mask=exists)
            n += 1
        first += TILE
    tl.store(spans + place * channels + c, span, mask=exists)


@triton.jit(do_not_specialize=["segments", "state_size"])
def carry_kernel(
    parts,
    spans,
    rates,
    initial,
    last,
    segments,
    channels,
    state_size,
    BLOCK: tl.constexpr,
    REVERSED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """In place: what each segment adds becomes what comes into it. `last`: what leaves the one that is run last."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(1).to(tl.int64)
    size = state_size * channels
    exists = entry < size
    c = entry % channels
    rate = tl.load(rates + entry, mask=exists, other=0.0)
    value = tl.zeros_like(rate)
    if HAS_INITIAL:
        value = tl.load(initial + sequence * size + entry, mask=exists, other=0.0)
    number = 0
    while number < segments:
        place = sequence * segments + number
        if REVERSED:
            place = sequence * segments + segments - 1 - number
        added = tl.load(parts + place * size + entry, mask=exists, other=0.0)
        span = tl.load(spans + place * channels + c, mask=exists, other=0.0)
        tl.store(parts + place * size + entry, value, mask=exists)
        value = tl.exp2(span * rate) * value + added
        number += 1
    tl.store(last + sequence * size + entry, value, mask=exists)


@triton.jit(do_not_specialize=["length", "state_size"])
def forward_kernel(
    u,
    delta,
    rates,
    B,
    C,
    D,
    z,
    bias,
    starts,
    states,
    out,
    length,
    channels,
    state_size,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """The outputs. `states`: scratch, and in the end the last state of each segment, (batch, segments, N, D)."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    padded = tl.num_programs(1) * SEGMENT
    place = (sequence * tl.num_programs(1) + segment) * state_size * channels
    steps = length - segment * SEGMENT
    first_row = (sequence * length + segment * SEGMENT) * channels
    u += first_row
    delta += first_row
    if HAS_Z:
        z += first_row
    out += first_row
    B += sequence * state_size * padded + segment * SEGMENT
    C += sequence * state_size * padded + segment * SEGMENT
    starts += place
    states += place
    exists = c < channels
    shift = vector(bias, c, channels, HAS_BIAS)
    through = vector(D, c, channels, HAS_D)
    n = 0
    while n < state_size:
        h = tl.load(starts + n * channels + c, mask=exists, other=0.0)
        tl.store(states + n * channels + c, h, mask=exists)
        n += 1
    first = 0
    while first < SEGMENT:
        sizes = ()
        drives = ()
        ys = ()
        for k in tl.static_range(TILE):
            size, _ = step_size(delta, shift, first + k, c, steps, channels, SOFTPLUS)
            value = row(u, first + k, c, steps, channels)
            sizes += (size,)
            drives += (size * value,)
            ys += (through * value,)
        n = 0
        while n < state_size:
            rate = tl.load(rates + n * channels + c, mask=exists, other=0.0)
            h = tl.load(states + n * channels + c, mask=exists, other=0.0)
            sums = ()
            for k in tl.static_range(TILE):
                h = tl.exp2(sizes[k] * rate) * h + drives[k] * tl.load(B + n * padded + first + k)
                sums += (ys[k] + tl.load(C + n * padded + first + k) * h,)
            ys = sums
            tl.store(states + n * channels + c, h, mask=exists)
            n += 1
        for k in tl.static_range(TILE):
            y = ys[k]
            if HAS_Z:
                gate = row(z, first + k, c, steps, channels)
                y *= gate * sigmoid(gate)
            tl.store(out + (first + k) * channels + c, y, mask=tl.where(exists, first + k, steps) < steps)
        first += TILE
