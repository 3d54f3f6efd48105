"""The kernels of the selective scan that run backward; `selective_triton.py` says how they work together."""

import triton
import triton.language as tl

from .selective_triton_steps import gated, is_inside, row, sigmoid, step_size, vector


@triton.jit(do_not_specialize=["length", "state_size"])
def retrace_kernel(
    u,
    delta,
    rates,
    B,
    C,
    z,
    bias,
    grad_out,
    starts,
    states,
    adjoints,
    spans,
    length,
    channels,
    state_size,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """`states`: before each chunk, (batch, segments * chunks, N, D); `adjoints`: what a segment adds before it."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    padded = tl.num_programs(1) * SEGMENT
    place = sequence * tl.num_programs(1) + segment
    size = state_size * channels
    steps = length - segment * SEGMENT
    first_row = (sequence * length + segment * SEGMENT) * channels
    u += first_row
    delta += first_row
    if HAS_Z:
        z += first_row
    grad_out += first_row
    B += sequence * state_size * padded + segment * SEGMENT
    C += sequence * state_size * padded + segment * SEGMENT
    starts += place * size
    adjoints += place * size
    states += place * (SEGMENT // TILE) * size
    exists = c < channels
    shift = vector(bias, c, channels, HAS_BIAS)
    span = tl.zeros_like(shift)
    n = 0
    while n < state_size:
        h = tl.load(starts + n * channels + c, mask=exists, other=0.0)
        tl.store(states + n * channels + c, h, mask=exists)
        tl.store(adjoints + n * channels + c, tl.zeros_like(shift), mask=exists)
        n += 1
    first = 0
    while first < SEGMENT:
        before = span
        sizes = ()
        drives = ()
        grads = ()
        for k in tl.static_range(TILE):
            step, _ = step_size(delta, shift, first + k, c, steps, channels, SOFTPLUS)
            sizes += (step,)
            drives += (step * row(u, first + k, c, steps, channels),)
            grads += (gated(row(grad_out, first + k, c, steps, channels), z, first + k, c, steps, channels, HAS_Z),)
            span += step
        n = 0
        while n < state_size:
            rate = tl.load(rates + n * channels + c, mask=exists, other=0.0)
            h = tl.load(states + n * channels + c, mask=exists, other=0.0)
            added = tl.load(adjoints + n * channels + c, mask=exists, other=0.0)
            product = tl.exp2(before * rate)
            for k in tl.static_range(TILE):
                decay = tl.exp2(sizes[k] * rate)
                h = decay * h + drives[k] * tl.load(B + n * padded + first + k)
                product *= decay
                added += product * (grads[k] * tl.load(C + n * padded + first + k))
            tl.store(adjoints + n * channels + c, added, mask=exists)
            tl.store(states + size + n * channels + c, h, mask=exists & (first + TILE < SEGMENT))
            n += 1
        states += size
        first += TILE
    tl.store(spans + place * channels + c, span, mask=exists)


@triton.jit(do_not_specialize=["length", "state_size"])
def backward_kernel(
    u,
    delta,
    rates,
    B,
    C,
    D,
    z,
    bias,
    grad_out,
    states,
    adjoints,
    grad_u,
    grad_delta,
    grad_z,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
    grad_bias,
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
    """All gradients: grad_A, grad_D and grad_bias by segment and sequence, grad_B and grad_C by block of channels.

    `adjoints`: scratch, the decay times the adjoint of the step after the present one.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    padded = tl.num_programs(1) * SEGMENT
    place = sequence * tl.num_programs(1) + segment
    size = state_size * channels
    steps = length - segment * SEGMENT
    first_row = (sequence * length + segment * SEGMENT) * channels
    u += first_row
    delta += first_row
    if HAS_Z:
        z += first_row
        grad_z += first_row
    grad_out += first_row
    grad_u += first_row
    grad_delta += first_row
    B += sequence * state_size * padded + segment * SEGMENT
    C += sequence * state_size * padded + segment * SEGMENT
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + sequence) * state_size * padded + segment * SEGMENT
    grad_B += part
    grad_C += part
    adjoints += place * size
    grad_A += place * size
    states += (place + 1) * (SEGMENT // TILE) * size
    exists = c < channels
    shift = vector(bias, c, channels, HAS_BIAS)
    through = vector(D, c, channels, HAS_D)
    sum_D = tl.zeros_like(shift)
    sum_bias = tl.zeros_like(shift)
    first = SEGMENT - TILE
    while first >= 0:
        states -= size
        sizes = ()
        drives = ()
        grads = ()
        ys = ()
        by_drive = ()
        by_size = ()
        for k in tl.static_range(TILE):
            step, _ = step_size(delta, shift, first + k, c, steps, channels, SOFTPLUS)
            value = row(u, first + k, c, steps, channels)
            grad = gated(row(grad_out, first + k, c, steps, channels), z, first + k, c, steps, channels, HAS_Z)
            sizes += (step,)
            drives += (step * value,)
            grads += (grad,)
            ys += (through * value,)
            by_drive += (tl.zeros_like(step),)
            by_size += (tl.zeros_like(step),)
            sum_D += grad * value
        n = 0
        while n < state_size:
            rate = tl.load(rates + n * channels + c, mask=exists, other=0.0)
            h = tl.load(states + n * channels + c, mask=exists, other=0.0)
            coming = tl.load(adjoints + n * channels + c, mask=exists, other=0.0)
            sum_A = tl.load(grad_A + n * channels + c, mask=exists & (first + TILE < SEGMENT), other=0.0)
            decays = ()
            pasts = ()
            new_ys = ()
            for k in tl.static_range(TILE):
                decay = tl.exp2(sizes[k] * rate)
                past = decay * h
                h = past + drives[k] * tl.load(B + n * padded + first + k)
                decays += (decay,)
                pasts += (past,)
                if HAS_Z:
                    new_ys += (ys[k] + tl.load(C + n * padded + first + k) * h,)
                tl.store(grad_C + n * padded + first + k, tl.sum(grads[k] * h, axis=0))
            if HAS_Z:
                ys = new_ys
            new_drive = ()
            new_size = ()
            for k in tl.static_range(TILE - 1, -1, -1):
                g = grads[k] * tl.load(C + n * padded + first + k) + coming
                tl.store(grad_B + n * padded + first + k, tl.sum(drives[k] * g, axis=0))
                slope = pasts[k] * g  # derivative with respect to step size times A
                new_drive = (by_drive[k] + tl.load(B + n * padded + first + k) * g,) + new_drive
                new_size = (by_size[k] + rate * slope,) + new_size
                sum_A += sizes[k] * slope
                coming = decays[k] * g
            by_drive = new_drive
            by_size = new_size
            tl.store(adjoints + n * channels + c, coming, mask=exists)
            tl.store(grad_A + n * channels + c, sum_A, mask=exists)
            n += 1
        for k in tl.static_range(TILE):
            here = is_inside(first + k, c, steps, channels)
            at = (first + k) * channels + c
            step, raw = step_size(delta, shift, first + k, c, steps, channels, SOFTPLUS)
            value = row(u, first + k, c, steps, channels)
            slope = by_drive[k] * value + by_size[k] * 0.6931471805599453  # log 2: rates are A / log 2
            if SOFTPLUS:
                slope *= sigmoid(raw)
            slope = tl.where(here, slope, 0.0)
            sum_bias += slope
            tl.store(grad_delta + at, slope, mask=here)
            tl.store(grad_u + at, by_drive[k] * step + grads[k] * through, mask=here)
            if HAS_Z:
                gate = row(z, first + k, c, steps, channels)
                share = sigmoid(gate)
                grad = row(grad_out, first + k, c, steps, channels)
                tl.store(grad_z + at, grad * ys[k] * share * (1.0 + gate * (1.0 - share)), mask=here)
        first -= TILE
    tl.store(grad_D + place * channels + c, sum_D, mask=exists)
    tl.store(grad_bias + place * channels + c, sum_bias, mask=exists)
