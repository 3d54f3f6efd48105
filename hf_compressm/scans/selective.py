"""The selective recurrence of Mamba layers, with the arguments and results of mamba-ssm's `selective_scan_fn`.

    h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t        y_t = C_t . h_t        out_t = (y_t + D u_t) * silu(z_t)

Glossary (A in continuous time, discretised by delta):

| symbol    | meaning                                                                     | shape                    |
|-----------|-----------------------------------------------------------------------------|--------------------------|
| u         | input sequence                                                              | (batch, channels, length)|
| delta     | step size per channel and time, before bias and softplus                    | (batch, channels, length)|
| A         | diagonal of the continuous state matrix, real                               | (channels, N)            |
| B, C      | input and read-out vectors, shared by all channels; others in `vectors.py`  | (batch, N, length)       |
| D         | feed-through                                                                | (channels,)              |
| z         | gate                                                                        | (batch, channels, length)|
| h         | state                                                                       | (batch, channels, N)     |
| drive     | delta_t u_t, the factor of the input vector B_t                             | (length, batch, channels)|
| decay     | exp(delta_t A)                                                              | (batch, channels, N)     |
| adjoint   | derivative of the loss with respect to h_t                                  | (batch, channels, N)     |

The fast scan is in `selective_chunks.py`; on a GPU it is in `selective_kernel.py`, if the kernels work there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .selective_chunks import (
    CHUNK_SIZE,
    chunk_buffers,
    chunked_selective_scan,
    chunks,
    compute_dtype,
    feed_through_and_gate,
    fill_chunk,
    step_sizes,
    time_major,
)
from .selective_kernel import fits, fused_selective_scan, has_kernel
from .transforms import is_transformed
from .vectors import by_channel, expected_shape, groups, is_constant


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective recurrence of Mamba, as mamba-ssm's `selective_scan_fn` does for real A.

    h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t, out_t = (y_t + D u_t) * silu(z_t), h_0 = 0,
    where delta is first shifted by `delta_bias` and passed through softplus if asked. Computed in float32 (float64 if
    an input is float64). Time O(batch * channels * length * N); memory beyond the arguments O(batch * channels *
    length / 16 * N). Differentiable once with respect to every tensor argument. With a constant B or C, and inside a
    transform of `torch.func`, it runs one step at a time. Complex A and mamba-ssm's `cu_seqlens` are not supported.

    Args:
        u: Input, (batch, channels, length), length at least 1.
        delta: Step sizes, (batch, channels, length).
        A: Continuous-time diagonal, real, (channels, N); negative entries decay.
        B: Input vectors, (batch, N, length), or one for each group of channels side by side, (batch, groups, N,
            length), or constant ones, (channels, N).
        C: Read-out vectors, in one of the forms of B, which need not be the same.
        D: Feed-through, (channels,).
        z: Gate, (batch, channels, length).
        delta_bias: Added to delta, (channels,).
        delta_softplus: Pass delta through softplus, after the bias.
        return_last_state: Also return the state after the last step.

    Returns:
        out (batch, channels, length) in the dtype of u; with `return_last_state` also the last state (batch,
        channels, N) in float32 (or float64).

    Raises:
        ValueError: If a shape or a dtype is not as above.

    Source: Gu and Dao, *Mamba* (arXiv 2312.00752), algorithm 2; recomputation as in its section 3.3.2.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if is_transformed():
        return selective_scan_reference(*arguments)
    _check_tensors(u, A, delta=delta, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if is_constant(B) or is_constant(C):
        return selective_scan_reference(*arguments)
    if B.dim() == 4 or C.dim() == 4:
        return _scan_by_group(*arguments)
    is_single = compute_dtype(u, delta, A, B, C) == torch.float32
    has_place = is_single and fits(u, A) and has_kernel(u.device, u.dtype)
    scan = fused_selective_scan if has_place else chunked_selective_scan
    with torch.autocast(device_type=u.device.type, enabled=False):
        out, last_state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last_state) if return_last_state else out


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence as it is written, one step at a time; arguments and results of `selective_scan`.

    h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t, out_t = (y_t + D u_t) * silu(z_t). Slow;
    differentiated by autograd. The tests compare with it.

    Args:
        u: Input, (batch, channels, length).
        delta: Step sizes, (batch, channels, length).
        A: Continuous-time diagonal, real, (channels, N).
        B: Input vectors, (batch, N, length), (batch, groups, N, length) or (channels, N).
        C: Read-out vectors, in one of the forms of B.
        D: Feed-through, (channels,).
        z: Gate, (batch, channels, length).
        delta_bias: Added to delta, (channels,).
        delta_softplus: Pass delta through softplus, after the bias.
        return_last_state: Also return the state after the last step.

    Returns:
        out (batch, channels, length), or (out, last state (batch, channels, N)).

    Raises:
        ValueError: If a shape or a dtype is not as above.
    """
    _check_tensors(u, A, delta=delta, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    dtype = compute_dtype(u, delta, A, B, C)
    inputs, A = u.to(dtype), A.to(dtype)
    B, C = (by_channel(vectors.to(dtype), *u.shape[1:]) for vectors in (B, C))
    steps = step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    h = inputs.new_zeros(u.shape[0], *A.shape)  # (batch, channels, N)
    outputs = []
    for t in range(u.shape[2]):
        step = steps[:, :, t, None]  # (batch, channels, 1)
        h = torch.exp(step * A) * h + step * inputs[:, :, t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    out = feed_through_and_gate(torch.stack(outputs, dim=-1), inputs, D, z).to(u.dtype)
    return (out, h) if return_last_state else out


@torch.no_grad()
def selective_states(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[Tensor]:
    """Yield the states h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t, chunk by chunk, without gradients.

    For calibration: only one chunk of states exists at a time.

    Args:
        u: Input, (batch, channels, length).
        delta: Step sizes, (batch, channels, length).
        A: Continuous-time diagonal, real, (channels, N).
        B: Input vectors, (batch, N, length).
        delta_bias: Added to delta, (channels,).
        delta_softplus: Pass delta through softplus, after the bias.
        chunk_size: Steps per chunk, at least 1; the last chunk may be shorter.

    Yields:
        States (chunk, batch, channels, N) in float32 (or float64). The next chunk uses the buffer again: clone what
        must be kept. It may be written to.

    Raises:
        ValueError: If a shape, a dtype or `chunk_size` is not as above.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it is a number of steps and must be at least 1.")
    if B.dim() != 3:
        raise ValueError(f"B has shape {tuple(B.shape)}; expected (batch, N, length), shared by all channels.")
    _check_tensors(u, A, delta=delta, B=B, delta_bias=delta_bias)
    dtype = compute_dtype(u, delta, A, B)
    A = A.to(dtype).T.contiguous()  # (N, channels)
    steps = step_sizes(delta.to(dtype), delta_bias, delta_softplus)
    drive, steps, B = time_major(u.to(dtype) * steps), time_major(steps), time_major(B.to(dtype))
    decay, states = chunk_buffers(steps, A, chunk_size)
    states[0].zero_()
    for chunk in chunks(steps.shape[0], chunk_size):
        count = chunk.stop - chunk.start
        fill_chunk(decay[:count], states[: count + 1], steps[chunk], drive[chunk], A, B[chunk])
        states[0] = states[count]
        yield states[1 : count + 1].transpose(2, 3)


def _scan_by_group(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` of one group of channels after the other."""
    outputs, last_states = [], []
    for channels, group_B, group_C in groups(B, C, u.shape[1]):
        group_D, group_bias = (None if tensor is None else tensor[channels] for tensor in (D, delta_bias))
        gate = None if z is None else z[:, channels]
        sequences = u[:, channels], delta[:, channels], A[channels], group_B, group_C
        out, last_state = selective_scan(*sequences, group_D, gate, group_bias, delta_softplus, True)
        outputs.append(out)
        last_states.append(last_state)
    out = torch.cat(outputs, dim=1)
    return (out, torch.cat(last_states, dim=1)) if return_last_state else out


def _check_tensors(u: Tensor, A: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError that names the offending value and what is expected."""
    if u.dim() != 3 or u.shape[2] < 1:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected (batch, channels, length) with length at least 1.")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected (channels, N) with {channels} channels as in u.")
    vectors = {name: expected_shape(others.get(name), batch, channels, A.shape[1], length) for name in ("B", "C")}
    expected = {
        "u": (u, u.shape),
        "delta": (others.get("delta"), u.shape),
        "A": (A, A.shape),
        "B": (others.get("B"), vectors["B"]),
        "C": (others.get("C"), vectors["C"]),
        "D": (others.get("D"), (channels,)),
        "z": (others.get("z"), u.shape),
        "delta_bias": (others.get("delta_bias"), (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)} with u {tuple(u.shape)} and "
                f"A {tuple(A.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; expected a real floating point dtype.")
