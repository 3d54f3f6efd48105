"""The kernels of the selective scan that run backward; `selective_triton.py` says how they work together."""

import triton
import triton.language as tl

from .selective_triton_steps import gate_slope, is_inside, row, sigmoid, step_size, tile, vector


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
        sizes, values, grads = tile(u, delta, z, grad_out, shift, first, c, steps, channels, TILE, SOFTPLUS, HAS_Z)
        drives = ()
        for k in tl.static_range(TILE):
            drives += (sizes[k] * values[k],)
            span += sizes[k]
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


@triton.jit
def _back_through_state(
    h,
    coming,
    sum_A,
    rate,
    chunk,
    sums,
    columns,
    at,
    TILE: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """One state through the steps of a chunk: forward again from `h`, then back, to what is `coming` before them.

    `chunk` holds step sizes, drives and gradients. The `sums` and `sum_A` are returned with this state's terms added.
    `columns` are the pointers of B, C and their gradients, which hold at `at` what belongs to this state and steps.
    """
    sizes, drives, grads = chunk
    ys, by_drive, by_size = sums
    B, C, grad_B, grad_C = columns[0] + at, columns[1] + at, columns[2] + at, columns[3] + at
    decays = ()
    pasts = ()
    new_ys = ()
    for k in tl.static_range(TILE):
        decay = tl.exp2(sizes[k] * rate)
        past = decay * h
        h = past + drives[k] * tl.load(B + k)
        decays += (decay,)
        pasts += (past,)
        if HAS_Z:
            new_ys += (ys[k] + tl.load(C + k) * h,)
        tl.store(grad_C + k, tl.sum(grads[k] * h, axis=0))
    if HAS_Z:
        ys = new_ys
    new_drive = ()
    new_size = ()
    for k in tl.static_range(TILE - 1, -1, -1):
        g = grads[k] * tl.load(C + k) + coming
        tl.store(grad_B + k, tl.sum(drives[k] * g, axis=0))
        slope = pasts[k] * g  # derivative with respect to step size times A
        new_drive = (by_drive[k] + tl.load(B + k) * g,) + new_drive
        new_size = (by_size[k] + rate * slope,) + new_size
        sum_A += sizes[k] * slope
        coming = decays[k] * g
    return coming, sum_A, ys, new_drive, new_size


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
    u, delta, grad_out = u + first_row, delta + first_row, grad_out + first_row
    grad_u, grad_delta = grad_u + first_row, grad_delta + first_row
    if HAS_Z:
        z, grad_z = z + first_row, grad_z + first_row
    of_B = sequence * state_size * padded + segment * SEGMENT
    part = of_B + tl.program_id(0).to(tl.int64) * tl.num_programs(2) * state_size * padded
    columns = B + of_B, C + of_B, grad_B + part, grad_C + part
    adjoints, grad_A = adjoints + place * size, grad_A + place * size
    states += (place + 1) * (SEGMENT // TILE) * size
    exists = c < channels
    shift, through = vector(bias, c, channels, HAS_BIAS), vector(D, c, channels, HAS_D)
    sum_D, sum_bias = tl.zeros_like(shift), tl.zeros_like(shift)
    first = SEGMENT - TILE
    while first >= 0:
        states -= size
        sizes, values, grads = tile(u, delta, z, grad_out, shift, first, c, steps, channels, TILE, SOFTPLUS, HAS_Z)
        drives, ys, by_drive = (), (), ()
        for k in tl.static_range(TILE):
            drives += (sizes[k] * values[k],)
            ys += (through * values[k],)
            by_drive += (tl.zeros_like(shift),)
            sum_D += grads[k] * values[k]
        by_size = by_drive
        chunk = sizes, drives, grads
        n = 0
        while n < state_size:
            rate = tl.load(rates + n * channels + c, mask=exists, other=0.0)
            h = tl.load(states + n * channels + c, mask=exists, other=0.0)
            coming = tl.load(adjoints + n * channels + c, mask=exists, other=0.0)
            sum_A = tl.load(grad_A + n * channels + c, mask=exists & (first + TILE < SEGMENT), other=0.0)
            coming, sum_A, ys, by_drive, by_size = _back_through_state(
                h, coming, sum_A, rate, chunk, (ys, by_drive, by_size), columns, n * padded + first, TILE, HAS_Z
            )
            tl.store(adjoints + n * channels + c, coming, mask=exists)
            tl.store(grad_A + n * channels + c, sum_A, mask=exists)
            n += 1
        for k in tl.static_range(TILE):
            t, at = first + k, (first + k) * channels + c
            here = is_inside(t, c, steps, channels)
            step, raw = step_size(delta, shift, t, c, steps, channels, SOFTPLUS)
            slope = by_drive[k] * row(u, t, c, steps, channels) + by_size[k] * 0.6931471805599453  # rates: A / log 2
            if SOFTPLUS:
                slope *= sigmoid(raw)
            slope = tl.where(here, slope, 0.0)
            sum_bias += slope
            tl.store(grad_delta + at, slope, mask=here)
            tl.store(grad_u + at, by_drive[k] * step + grads[k] * through, mask=here)
            if HAS_Z:
                grad = row(grad_out, t, c, steps, channels) * ys[k] * gate_slope(row(z, t, c, steps, channels))
                tl.store(grad_z + at, grad, mask=here)
        first -= TILE
    tl.store(grad_D + place * channels + c, sum_D, mask=exists)
    tl.store(grad_bias + place * channels + c, sum_bias, mask=exists)
