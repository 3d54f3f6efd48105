"""The recurrence of Mamba-2 layers ("SSD"), with the layouts of mamba-ssm's `mamba_chunk_scan_combined`.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        out_t = y_t * silu(z_t)

Glossary (A in continuous time, discretised by dt):

| symbol     | meaning                                                              | shape                           |
|------------|----------------------------------------------------------------------|---------------------------------|
| x          | input sequence                                                       | (batch, length, heads, head_dim)|
| dt         | step size per head and time, before bias, softplus and limits        | (batch, length, heads)          |
| A          | continuous-time decay, one real number per head                      | (heads,)                        |
| B, C       | input and read-out vectors, shared by the heads of a group           | (batch, length, groups, N)      |
| D          | feed-through                                                         | (heads,) or (heads, head_dim)   |
| z          | gate                                                                 | as x                            |
| h          | state                                                                | (batch, heads, head_dim, N)     |
| seq_idx    | which text of its row a step belongs to; h is zero before each text  | (batch, length)                 |
| drive      | dt_t x_t, the factor of the input vector B_t                         | as x                            |
| T          | steps per chunk                                                      |                                 |

Inside a chunk the outputs are one masked T x T matrix product per head, as in attention; only the states at the chunk
boundaries, one per T steps, are computed one after the other, in `ssd_chunks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .ssd_chunks import chunked_scan, states_after_chunks
from .transforms import is_transformed


STATES_CHUNK_SIZE = 16  # steps per chunk of `ssd_states`, which keeps the states of a whole chunk
NO_LIMIT = (0.0, math.inf)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba-2, as mamba-ssm's `mamba_chunk_scan_combined` does, with its arguments by position.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, out_t = y_t * silu(z_t), where dt is first
    shifted by `dt_bias`, passed through softplus if asked, and clamped to `dt_limit`. Head j reads B and C of group
    j // (heads / groups). With `seq_idx`, a state starts from zero where the index changes. Computed in float32
    (float64 if an input is float64); inside a transform of `torch.func` one step at a time. Time
    O(batch * length * heads * head_dim * (N + T)), memory beyond the arguments O(batch * length * heads *
    head_dim * (1 + N / T)) with T steps per chunk. Differentiable once with respect to every tensor argument.

    Args:
        x: Input, (batch, length, heads, head_dim), length at least 1.
        dt: Step sizes, (batch, length, heads).
        A: Continuous-time decay, real, (heads,); negative entries decay.
        B: Input vectors, (batch, length, groups, N); heads is a multiple of groups.
        C: Read-out vectors, (batch, length, groups, N).
        chunk_size: T, at least 1; changes the speed and nothing else. None chooses by N.
        D: Feed-through, (heads,) or (heads, head_dim).
        z: Gate, (batch, length, heads, head_dim).
        dt_bias: Added to dt, (heads,).
        initial_states: State before the first step, (batch, heads, head_dim, N); zero if None.
        seq_idx: Index of the text that a step belongs to, integers, (batch, length); one text per row if None.
        cu_seqlens: Not supported, as are mamba-ssm's `return_varlen_states`, which it is for; pass `seq_idx`.
        dt_softplus: Pass dt through softplus, after the bias.
        dt_limit: Smallest and largest step size, applied last.
        return_final_states: Also return the state after the last step, which is that of the last text of a row.

    Returns:
        out (batch, length, heads, head_dim) in the dtype of x; with `return_final_states` also the last state (batch,
        heads, head_dim, N) in float32 (or float64).

    Raises:
        ValueError: If a shape, a dtype, `dt_limit` or `chunk_size` is not as above, or `cu_seqlens` is given.

    Source: Dao and Gu, *Transformers are SSMs* (arXiv 2405.21060), section 6 and listing 1; here C B^T is computed
    once per group instead of once per head.
    """
    if is_transformed():
        return ssd_scan_reference(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            D,
            z,
            dt_bias,
            initial_states,
            seq_idx,
            cu_seqlens,
            dt_softplus,
            dt_limit,
            return_final_states,
        )
    _check_options(dt_limit, chunk_size, cu_seqlens)
    _check_tensors(x, B, dt=dt, A=A, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx)
    dtype = _compute_dtype(x, dt, A, B, C, initial_states)
    with torch.autocast(device_type=x.device.type, enabled=False):
        steps = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
        inputs = x.to(dtype)
        state = _initial_state(inputs, B, initial_states)
        drive, log_decay = inputs * steps[..., None], _log_decay(steps, A, seq_idx)
        chunk_size = min(chunk_size or _choose_chunk_size(B.shape[-1]), x.shape[1])
        y, last_state = chunked_scan(drive, log_decay, B.to(dtype), C.to(dtype), state, chunk_size)
        out = _feed_through_and_gate(y, inputs, D, z).to(x.dtype).contiguous()
    return (out, last_state) if return_final_states else out


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence as it is written, one step at a time; arguments and results of `ssd_scan`.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, out_t = y_t * silu(z_t). Slow; differentiated
    by autograd. The tests compare with it.

    Args:
        x: Input, (batch, length, heads, head_dim).
        dt: Step sizes, (batch, length, heads).
        A: Continuous-time decay, real, (heads,).
        B: Input vectors, (batch, length, groups, N).
        C: Read-out vectors, (batch, length, groups, N).
        chunk_size: Accepted and not used.
        D: Feed-through, (heads,) or (heads, head_dim).
        z: Gate, (batch, length, heads, head_dim).
        dt_bias: Added to dt, (heads,).
        initial_states: State before the first step, (batch, heads, head_dim, N); zero if None.
        seq_idx: Index of the text that a step belongs to, integers, (batch, length); one text per row if None.
        cu_seqlens: Not supported, as are mamba-ssm's `return_varlen_states`, which it is for; pass `seq_idx`.
        dt_softplus: Pass dt through softplus, after the bias.
        dt_limit: Smallest and largest step size, applied last.
        return_final_states: Also return the state after the last step, which is that of the last text of a row.

    Returns:
        out (batch, length, heads, head_dim), or (out, last state (batch, heads, head_dim, N)).

    Raises:
        ValueError: If a shape, a dtype, `dt_limit` or `chunk_size` is not as above, or `cu_seqlens` is given.
    """
    _check_options(dt_limit, chunk_size, cu_seqlens)
    _check_tensors(x, B, dt=dt, A=A, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx)
    dtype = _compute_dtype(x, dt, A, B, C, initial_states)
    inputs = x.to(dtype)
    steps = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    decay = torch.exp(_log_decay(steps, A, seq_idx))  # (batch, length, heads)
    repeats = x.shape[2] // B.shape[2]
    B, C = (vectors.to(dtype).repeat_interleave(repeats, dim=2) for vectors in (B, C))  # (batch, length, heads, N)
    h = _initial_state(inputs, B, initial_states)
    outputs = []
    for t in range(x.shape[1]):
        step = steps[:, t, :, None, None]  # (batch, heads, 1, 1)
        h = decay[:, t, :, None, None] * h + step * inputs[:, t, :, :, None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    out = _feed_through_and_gate(torch.stack(outputs, dim=1), inputs, D, z).to(x.dtype)
    return (out, h) if return_final_states else out


@torch.no_grad()
def ssd_states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_states: Tensor | None = None,
    chunk_size: int = STATES_CHUNK_SIZE,
    seq_idx: Tensor | None = None,
    every: int = 1,
) -> Iterator[Tensor]:
    """Yield the states h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, chunk by chunk, without gradients.

    For calibration: only one chunk of states exists at a time.

    Args:
        x: Input, (batch, length, heads, head_dim).
        dt: Step sizes, (batch, length, heads).
        A: Continuous-time decay, real, (heads,).
        B: Input vectors, (batch, length, groups, N).
        dt_bias: Added to dt, (heads,).
        dt_softplus: Pass dt through softplus, after the bias.
        dt_limit: Smallest and largest step size, applied last.
        initial_states: State before the first step, (batch, heads, head_dim, N); zero if None.
        chunk_size: Steps per chunk, at least 1; the last chunk may be shorter.
        seq_idx: Index of the text that a step belongs to, integers, (batch, length); one text per row if None.
        every: Yield only the states after every `every`-th step, one in each chunk; those between are not computed.

    Yields:
        States (chunk, batch, heads, head_dim, N) in float32 (or float64). The next chunk uses the buffer again: clone
        what must be kept. It may be written to.

    Raises:
        ValueError: If a shape, a dtype, `dt_limit` or `chunk_size` is not as above.
    """
    _check_options(dt_limit, chunk_size)
    _check_tensors(x, B, dt=dt, A=A, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx)
    dtype = _compute_dtype(x, dt, A, B, initial_states)
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    steps = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    drive = (x.to(dtype) * steps[..., None]).transpose(0, 1)  # (length, batch, heads, head_dim)
    decay = torch.exp(_log_decay(steps, A, seq_idx)).transpose(0, 1)[..., None, None]  # (length, batch, heads, 1, 1)
    B = B.to(dtype).transpose(0, 1)
    if every > 1:
        rows, vectors = drive.transpose(0, 1), B.transpose(0, 1)
        before = _initial_state(rows, vectors, initial_states)
        for state in states_after_chunks(rows, _log_decay(steps, A, seq_idx), vectors, before, every):
            yield state[None]
        return
    states = drive.new_empty(min(chunk_size, length), batch, heads, head_dim, state_size)
    before = _initial_state(drive.transpose(0, 1), B, initial_states)
    for start in range(0, length, chunk_size):
        chunk = slice(start, min(start + chunk_size, length))
        filled = states[: chunk.stop - start]
        torch.mul(
            drive[chunk].unflatten(2, (groups, -1))[..., None],  # (chunk, batch, groups, heads / groups, head_dim, 1)
            B[chunk, :, :, None, None, :],
            out=filled.unflatten(2, (groups, -1)),
        )
        for decay_t, state_t in zip(decay[chunk].unbind(0), filled.unbind(0), strict=True):
            before = state_t.addcmul_(decay_t, before)
        before = before.clone()
        yield filled


def _choose_chunk_size(state_size: int) -> int:
    """Steps per chunk: many make the T x T products expensive, few the N x head_dim states at the boundaries.

    Measured, forward plus backward, seconds of one core, 8 heads of 64, batch 8, length 512: N=16: 0.067 (T=16), 0.074
    (32), 0.090 (64). N=64: 0.176, 0.114, 0.123. N=128: 0.161 (32), 0.148 (64), 0.178 (128).
    """
    return 32 if state_size <= 64 else 64


def _initial_state(x: Tensor, B: Tensor, initial_states: Tensor | None) -> Tensor:
    """The given state in the dtype of x, or zeros, (batch, heads, head_dim, N)."""
    if initial_states is not None:
        return initial_states.to(x.dtype)
    batch, _, heads, head_dim = x.shape
    return x.new_zeros(batch, heads, head_dim, B.shape[-1])


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """Dt with its bias added, passed through softplus if asked, within its limits, (batch, length, heads)."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt if tuple(dt_limit) == (-math.inf, math.inf) else dt.clamp(*dt_limit)


def _log_decay(steps: Tensor, A: Tensor, seq_idx: Tensor | None) -> Tensor:
    """The exponents dt_t A, (batch, length, heads); minus infinity at the first step of every text but a row's first.

    The exponential of that is 0: nothing of the text before is left.
    """
    log_decay = steps * A.to(steps.dtype)
    if seq_idx is None:
        return log_decay
    return log_decay.masked_fill(text_starts(seq_idx)[..., None], -math.inf)


def text_starts(seq_idx: Tensor) -> Tensor:
    """Whether a step is the first of a text, but for the first of its row, (batch, length)."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def _feed_through_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) * silu(z), in the dtype of y, (batch, length, heads, head_dim)."""
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None]).to(y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    doubles = [tensor for tensor in tensors if tensor is not None and tensor.dtype == torch.float64]
    return torch.float64 if doubles else torch.float32


def _check_options(
    dt_limit: tuple[float, float], chunk_size: int | None = None, cu_seqlens: Tensor | None = None
) -> None:
    """Raise a ValueError that names the offending value and what is expected."""
    if isinstance(chunk_size, Tensor):
        raise ValueError(
            f"chunk_size is a tensor {tuple(chunk_size.shape)}; it is the sixth argument and a number of steps, "
            "and D comes after it, as in mamba-ssm."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it is a number of steps and must be at least 1.")
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens is not supported; pass the texts of a row as seq_idx, (batch, length).")
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit is {dt_limit}; expected the smallest and the largest step size.")


def _check_tensors(x: Tensor, B: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError that names the tensor of a wrong shape and what is expected."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (batch, length, heads, head_dim) with length at least 1."
        )
    batch, length, heads, head_dim = x.shape
    if B.dim() != 4 or B.shape[2] < 1 or heads % B.shape[2]:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; expected (batch, length, groups, N) with a number of groups that divides "
            f"the {heads} heads of x."
        )
    vectors = (batch, length, *B.shape[2:])
    D = others.get("D")
    expected = {
        "x": (x, x.shape),
        "dt": (others.get("dt"), (batch, length, heads)),
        "A": (others.get("A"), (heads,)),
        "B": (B, vectors),
        "C": (others.get("C"), vectors),
        "D": (D, (heads, head_dim) if D is not None and D.dim() == 2 else (heads,)),
        "z": (others.get("z"), x.shape),
        "dt_bias": (others.get("dt_bias"), (heads,)),
        "initial_states": (others.get("initial_states"), (batch, heads, head_dim, B.shape[3])),
        "seq_idx": (others.get("seq_idx"), (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)} with x {tuple(x.shape)} and "
                f"B {tuple(B.shape)}."
            )
        if name == "seq_idx":
            if tensor.is_floating_point() or tensor.is_complex():
                raise ValueError(f"seq_idx is {tensor.dtype}; expected an integer dtype.")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; expected a real floating point dtype.")
