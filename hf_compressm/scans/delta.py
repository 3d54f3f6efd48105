"""The delta rule with decay: the recurrence of gated delta nets and of Kimi delta attention, in fla's layouts.

    S_t = diag(exp(g_t)) S_{t-1} + beta_t k_t (v_t - k_t^T diag(exp(g_t)) S_{t-1})^T        o_t = scale S_t^T q_t

Glossary (discrete time):

| symbol     | meaning                                                          | shape                              |
|------------|------------------------------------------------------------------|------------------------------------|
| q, k       | read-out and input vectors, shared by the value heads of a group | (batch, length, key heads, dk)     |
| v          | what is written                                                  | (batch, length, heads, dv)         |
| g          | logarithm of the decay, per head or per head and key channel     | (batch, length, heads) or (..., dk)|
| beta       | share of what k_t reads that is replaced by v_t                  | (batch, length, heads)             |
| S, state   | of a value head                                                  | (batch, heads, dk, dv)             |

Linear attention without the erasing term, S_t = exp(g_t) S_{t-1} + k_t v_t^T, is another recurrence: `ssd_scan`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .delta_chunks import delta_recurrence
from .ssd import text_starts
from .transforms import is_transformed


CHUNK_SIZE = 32  # steps per chunk of `delta_scan`
STATES_CHUNK_SIZE = 16  # steps per chunk of `delta_states`, which keeps the states of a whole chunk
CHUNKED_FROM = 8  # steps between the states of `delta_states` from which on chunks are faster than steps
NORM_EPSILON = 1e-6  # added to the squared length of q and k, as in fla and transformers


class _Given(NamedTuple):
    """The arguments that have defaults, with them filled in; the state has the dtype of the computation."""

    g: Tensor
    beta: Tensor
    state: Tensor


def delta_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule or Kimi delta attention, as fla's `chunk_gated_delta_rule` and `chunk_kda` do.

    S_t = diag(exp(g_t)) S_{t-1}, then S_t += beta_t k_t (v_t - k_t^T S_t)^T, o_t = scale S_t^T q_t. Value head j reads
    q and k of key head j // (heads / key heads). With `seq_idx`, a state starts from zero where the index changes.
    Computed in float32 (float64 if an input is float64); inside a transform of `torch.func` one step at a time. Time
    O(batch * length * heads * (dk * dv + T * (dk + dv))), memory beyond the arguments O(batch * length * heads * (dv +
    T + dk * dv / T)) with T steps per chunk. Differentiable once with respect to every tensor argument.

    Args:
        query: q, (batch, length, key heads, dk).
        key: k, (batch, length, key heads, dk).
        value: v, (batch, length, heads, dv), length at least 1; heads is a multiple of key heads.
        g: Logarithm of the decay, at most 0, (batch, length, heads) or (batch, length, heads, dk); no decay if None.
        beta: (batch, length, heads); 1 if None, which replaces all that k reads.
        initial_state: State before the first step, (batch, heads, dk, dv); zero if None.
        output_final_state: Also return the state after the last step, which is that of the last text of a row.
        use_qk_l2norm_in_kernel: Divide q and k by their lengths, sqrt(|k|^2 + 1e-6).
        scale: Factor of q; dk ** -0.5 if None.
        seq_idx: Index of the text that a step belongs to, integers, (batch, length); one text per row if None.
        chunk_size: T, a power of two; changes the speed and nothing else. 32 if None, or the length if that is less.

    Returns:
        o (batch, length, heads, dv) in the dtype of query, and the last state (batch, heads, dk, dv) in float32 (or
        float64), None if not asked for.

    Raises:
        ValueError: If a shape, a dtype or `chunk_size` is not as above.

    Source: Yang et al., *Gated Delta Networks* (arXiv 2412.06464), section 3.3; for a decay per channel Kimi Team,
    *Kimi Linear* (arXiv 2510.26692), section 3.
    """
    if is_transformed():
        normalises = use_qk_l2norm_in_kernel
        return delta_scan_reference(
            query, key, value, g, beta, initial_state, output_final_state, normalises, scale, seq_idx, chunk_size
        )
    given = _check(query, key, value, g, beta, initial_state, seq_idx, chunk_size)
    with torch.autocast(device_type=value.device.type, enabled=False):
        epsilon = NORM_EPSILON if use_qk_l2norm_in_kernel else None
        scale = key.shape[-1] ** -0.5 if scale is None else scale
        T = chunk_size or _choose_chunk_size(value.shape[1])
        out, last, *_ = delta_recurrence(query, key, value, *given, T, scale, epsilon)
    return out.to(query.dtype), last if output_final_state else None


def delta_scan_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as it is written, one step at a time; arguments and results of `delta_scan`.

    S_t = diag(exp(g_t)) S_{t-1}, then S_t += beta_t k_t (v_t - k_t^T S_t)^T, o_t = scale S_t^T q_t. Slow;
    differentiated by autograd. The tests compare with it.

    Args:
        query: q, (batch, length, key heads, dk).
        key: k, (batch, length, key heads, dk).
        value: v, (batch, length, heads, dv).
        g: Logarithm of the decay, (batch, length, heads) or (batch, length, heads, dk); no decay if None.
        beta: (batch, length, heads); 1 if None.
        initial_state: State before the first step, (batch, heads, dk, dv); zero if None.
        output_final_state: Also return the state after the last step.
        use_qk_l2norm_in_kernel: Divide q and k by their lengths, sqrt(|k|^2 + 1e-6).
        scale: Factor of q; dk ** -0.5 if None.
        seq_idx: Index of the text that a step belongs to, integers, (batch, length); one text per row if None.
        chunk_size: Checked and not used.

    Returns:
        o (batch, length, heads, dv) in the dtype of query, and the last state (batch, heads, dk, dv) in float32 (or
        float64), None if not asked for.

    Raises:
        ValueError: If a shape, a dtype or `chunk_size` is not as above.
    """
    g, beta, S = _check(query, key, value, g, beta, initial_state, seq_idx, chunk_size)
    g, beta, q, k, v = (tensor.to(S.dtype) for tensor in (g, beta, query, key, value))
    if use_qk_l2norm_in_kernel:
        q, k = _normalised(q), _normalised(k)
    q = q * (key.shape[-1] ** -0.5 if scale is None else scale)
    repeats = value.shape[2] // key.shape[2]
    q, k = (vectors.repeat_interleave(repeats, dim=2) for vectors in (q, k))  # (batch, length, heads, dk)
    decay = torch.exp(g if g.dim() == 4 else g[..., None])[..., None]  # (batch, length, heads, dk or 1, 1)
    outputs = []
    for t in range(value.shape[1]):
        S = decay[:, t] * S
        erased = (k[:, t, :, :, None] * S).sum(-2)  # what k_t reads, (batch, heads, dv)
        written = beta[:, t, :, None] * (v[:, t] - erased)
        S = S + k[:, t, :, :, None] * written[:, :, None, :]
        outputs.append((q[:, t, :, :, None] * S).sum(-2))
    out = torch.stack(outputs, dim=1).to(query.dtype)
    return out, S if output_final_state else None


@torch.no_grad()
def delta_states(
    key: Tensor,
    value: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    every: int = 1,
    use_qk_l2norm_in_kernel: bool = False,
    seq_idx: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the states S_t of `delta_scan`, chunk by chunk, without gradients.

    For calibration: only one chunk of states exists at a time.

    Args:
        key: k, (batch, length, key heads, dk).
        value: v, (batch, length, heads, dv).
        g: Logarithm of the decay, (batch, length, heads) or (batch, length, heads, dk); no decay if None.
        beta: (batch, length, heads); 1 if None.
        initial_state: State before the first step, (batch, heads, dk, dv); zero if None.
        every: Yield only the states after every `every`-th step. From 8 on, one in each chunk, and those between are
            not computed.
        use_qk_l2norm_in_kernel: Divide k by its length, sqrt(|k|^2 + 1e-6).
        seq_idx: Index of the text that a step belongs to, integers, (batch, length); one text per row if None.

    Yields:
        States (steps, batch, heads, dk, dv) in float32 (or float64). The next chunk uses the buffer again: clone what
        must be kept. It may be written to.

    Raises:
        ValueError: If a shape, a dtype or `every` is not as above.
    """
    if every < 1:
        raise ValueError(f"every is {every}; it is a number of steps and must be at least 1.")
    g, beta, S = _check(key, key, value, g, beta, initial_state, seq_idx)
    length, repeats = value.shape[1], value.shape[2] // key.shape[2]
    if every >= CHUNKED_FROM:
        for start in range(0, length - every + 1, every):
            k, v, g_t, beta_t = (tensor[:, start : start + every] for tensor in (key, value, g, beta))
            _, last = delta_scan(k, k, v, g_t, beta_t, S, True, use_qk_l2norm_in_kernel)
            assert last is not None
            S = last
            yield S.clone()[None]
        return
    g, beta, k, v = (tensor.to(S.dtype) for tensor in (g, beta, key, value))
    k = (_normalised(k) if use_qk_l2norm_in_kernel else k).repeat_interleave(repeats, dim=2)[..., None]
    decay = torch.exp(g if g.dim() == 4 else g[..., None])[..., None]  # (batch, length, heads, dk or 1, 1)
    steps = STATES_CHUNK_SIZE // every * every
    states = S.new_empty(min(steps, length), *S.shape)
    for start in range(0, length - every + 1, steps):
        filled = states[: length - start]
        for t, state in enumerate(filled.unbind(0), start):
            torch.mul(decay[:, t], S, out=state)
            written = beta[:, t, :, None, None] * (v[:, t, :, None] - torch.matmul(k[:, t].mT, state))
            S = state.addcmul_(k[:, t], written)  # (batch, heads, dk, 1) by (batch, heads, 1, dv)
        S = S.clone()
        yield filled[every - 1 :: every]


def _choose_chunk_size(length: int) -> int:
    """Steps per chunk: many make the T x T products expensive, few the dk x dv states at the boundaries.

    Measured, forward plus backward, seconds of one core, 4 heads of 128, batch 2, length 512, for T = 16, 32 and 64:
    decay per head, dk=128: 0.047, 0.044, 0.048; dk=32: 0.021, 0.021, 0.026; per channel, dk=128: 0.069, 0.066, 0.073.
    """
    return min(CHUNK_SIZE, 1 << (length - 1).bit_length())


def _normalised(vectors: Tensor) -> Tensor:
    """Vectors divided by their lengths."""
    return vectors * torch.rsqrt((vectors * vectors).sum(-1, keepdim=True) + NORM_EPSILON)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int | None = None,
) -> _Given:
    """Check the arguments of a scan; fill in the defaults, and let nothing of a text be left in the next one."""
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size is {chunk_size}; it is a number of steps and must be a power of two.")
    _check_tensors(query, key, value, g, beta, initial_state)
    dtype = _compute_dtype(query, key, value, g, beta, initial_state)
    batch, length, heads, dv = value.shape
    g = value.new_zeros(batch, length, heads, dtype=dtype) if g is None else g
    beta = value.new_ones(batch, length, heads, dtype=dtype) if beta is None else beta
    if initial_state is None:
        initial_state = value.new_zeros(batch, heads, key.shape[-1], dv)
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (batch, length) or seq_idx.is_floating_point() or seq_idx.is_complex():
            raise ValueError(
                f"seq_idx has shape {tuple(seq_idx.shape)} and is {seq_idx.dtype}; expected integers {batch, length}."
            )
        starts = text_starts(seq_idx)
        g = g.masked_fill(starts.view(*starts.shape, *(1,) * (g.dim() - 2)), -math.inf)
    return _Given(g, beta, initial_state.to(dtype))


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    doubles = [tensor for tensor in tensors if tensor is not None and tensor.dtype == torch.float64]
    return torch.float64 if doubles else torch.float32


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor | None, beta: Tensor | None, initial_state: Tensor | None
) -> None:
    """Raise a ValueError that names the tensor of a wrong shape and what is expected."""
    if value.dim() != 4 or value.shape[1] < 1:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; expected (batch, length, heads, dv) with length at least 1."
        )
    batch, length, heads, dv = value.shape
    if key.dim() != 4 or key.shape[2] < 1 or heads % key.shape[2]:
        raise ValueError(
            f"key has shape {tuple(key.shape)}; expected (batch, length, key heads, dk) with a number of heads that "
            f"divides the {heads} heads of value."
        )
    dk, per_step = key.shape[3], (batch, length, heads)
    expected = {
        "query": (query, tuple(key.shape)),
        "key": (key, (batch, length, *key.shape[2:])),
        "value": (value, tuple(value.shape)),
        "g": (g, (*per_step, dk) if g is not None and g.dim() == 4 else per_step),
        "beta": (beta, per_step),
        "initial_state": (initial_state, (batch, heads, dk, dv)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} with key {tuple(key.shape)} and value "
                f"{tuple(value.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; expected a real floating point dtype.")
