"""One call of a recurrence, as its layer made it, and what is measured of it.

| symbol | meaning | shape |
|---|---|---|
| h | states; the channels of a group share B and C | `(steps, batch, groups, channels, N)` |
| B, C | input and read-out | `(batch, length, groups, N)` |
| gain | loudness: from a channel's read-out to the layer's output | `(length, batch, groups, channels)` |
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compressm.families.sampling import sample
from hf_compressm.scans import delta_states, diagonal_scan, selective_scan, selective_states, ssd_scan, ssd_states
from hf_compressm.scans.kernels import torch_path
from hf_compressm.scans.linear_attention import linear_states
from hf_compressm.scans.mlstm import mlstm_states
from hf_compressm.scans.selective_chunks import step_sizes
from hf_compressm.scans.trapezoidal import rotated, trapezoidal_states


SELECTIVE, SSD, DIAGONAL = "selective_scan", "ssd_scan", "diagonal_scan"
MAMBA3, DELTA, MLSTM = "mamba3_siso_combined", "delta_rule", "mlstm"
GLA = "gated_linear_attention"
ALIASES = {
    SELECTIVE: {"hidden_states": "u", "dt": "delta"},
    SSD: {"hidden_states": "x"},
    DIAGONAL: {},
    MAMBA3: {"Q": "C", "K": "B", "V": "x", "Z": "z"},
    DELTA: {"query": "C", "q": "C", "key": "B", "k": "B", "value": "x", "v": "x"},
    GLA: {"q": "C", "k": "B", "v": "x", "gk": "g"},
    MLSTM: {
        **{"query": "C", "key": "B", "value": "x"},
        **{"q": "C", "k": "B", "v": "x", "i": "igate", "f": "fgate"},  # as mlstm_kernels has them
    },
}
"""Other names of arguments, by kind of recurrence."""
L2_EPS = 1e-6
"""Of the squared length of queries and keys, in the delta rule's kernels."""
_OWN: dict[str, Callable[..., Any]] = {SELECTIVE: selective_scan, SSD: ssd_scan, DIAGONAL: diagonal_scan}


@dataclass(eq=False)
class Call:
    """One call of a recurrence.

    Attributes:
        kind: `"selective_scan"`, `"ssd_scan"`, `"diagonal_scan"`, `"mamba3_siso_combined"`, `"delta_rule"`,
            `"gated_linear_attention"` or `"mlstm"`, whose argument names are used, those of the last four's vectors
            and signals as in `ssd_scan`.
        arguments: by name; absent ones are left out.
        output: what it returned first.
        gain: loudness of every entry of the output, in its shape; None where the layer has no output projection.
    """

    kind: str
    arguments: Mapping[str, Any]
    output: Tensor
    gain: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """One forward call of a layer, as it was seen.

    Attributes:
        module: the layer.
        args: its positional arguments.
        kwargs: its other arguments.
        mask: `(batch, length)`, 1 for real tokens and 0 for padding; None if all are real.
        calls: of recurrences, in their order.
        gradient: of the sum of the batch's losses by the layer's output, in its shape; None where it is not known.
        scored: number of losses, one for a token or an example; 0 where no loss is looked at.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: Tensor | None
    calls: Sequence[Call]
    gradient: Tensor | None = None
    scored: int = 0


@dataclass(frozen=True, eq=False)
class Example:
    """What a layer was called with.

    Attributes:
        args: its positional arguments.
        kwargs: its other arguments, without a cache.
        mask: `(batch, length)`, 1 for real tokens; None if all are.
        autocast: the dtype in which matrices were multiplied, or None for that of the tensors.
        gradient: of the sum of the losses by the output, `(batch, length, channels)`; or None.
        scored: losses of a row, on average.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: Tensor | None = None
    autocast: torch.dtype | None = None
    gradient: Tensor | None = None
    scored: float = 0.0


@dataclass(frozen=True, eq=False)
class Signals:
    """What the recurrence of one call computes, in float32 at least."""

    states: Iterator[Tensor]  # chunks in time, (steps, batch, groups, channels, N), which may be overwritten
    every: int  # the states are those after every so many steps
    gain: Tensor  # (length, batch, groups, channels), 0 at padding
    B: Tensor  # (batch, length, groups, N)
    C: Tensor  # (batch, length, groups, N)
    mask: Tensor  # (batch, length), 1 for real tokens and 0 for padding


def first_tensor(result: Any) -> Tensor:
    """The output of a layer in what it returned."""
    while not isinstance(result, Tensor):
        result = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
    return result


def bound(kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the recurrences of this package have for them."""
    places = inspect.signature(torch_path(function)).parameters.values()
    if any(place.kind is inspect.Parameter.VAR_POSITIONAL for place in places):  # a wrapper that names no arguments
        places = inspect.signature(_OWN.get(kind, function)).parameters.values()
    given = dict(zip([place.name for place in places], args, strict=False)) | dict(kwargs)
    given = {name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()}
    return {ALIASES[kind].get(name, name): value for name, value in given.items() if value is not None}


def signals(call: Call, mask: Tensor | None) -> Signals:
    """The signals of a call of a selective recurrence.

    Args:
        call: a call with a gain.
        mask: `(batch, length)`, 1 for real tokens, in the order of the layer's input; None if all are. Where a call
            runs over the tokens in another order, its padding is where nothing is heard.

    Raises:
        ValueError: if texts of one row cannot be told apart.
    """
    of_kind = {
        **{SSD: _ssd_signals, MAMBA3: _mamba3_signals, MLSTM: _mlstm_signals},
        **dict.fromkeys((DELTA, GLA), _linear_attention_signals),
    }
    return of_kind.get(call.kind, _selective_signals)(call, mask)


def tokens_of(call: Call, mask: Tensor | None) -> Tensor:
    """How many tokens `signals` counts in a call, a number on its device."""
    gain, axis = call.gain, 2 if call.kind in (SELECTIVE, MLSTM) else 1
    assert gain is not None  # as below
    if mask is None:
        return torch.full((), gain.shape[0] * gain.shape[axis], device=gain.device)
    return (gain.movedim(axis, 1).flatten(2) != 0).any(dim=-1).sum()


@dataclass(frozen=True, eq=False)
class SelectiveInputs:
    """What a selective scan works on, in float32 at least."""

    u: Tensor  # (batch, channels, length)
    delta: Tensor  # (batch, channels, length), after bias and softplus
    A: Tensor  # (channels, N)
    B: Tensor  # (batch, groups, N, length)
    C: Tensor  # (batch, groups, N, length)
    gain: Tensor  # (length, batch, groups, channels), 0 at padding
    mask: Tensor  # (batch, length), 1 for real tokens and 0 for padding


def selective_inputs(call: Call, rows: slice = slice(None), mask: Tensor | None = None) -> SelectiveInputs:
    """The inputs of a call of a selective scan.

    Args:
        call: a call with a gain, and with B and C that differ from step to step.
        rows: the rows of the batch to take.
        mask: as for `signals`.
    """
    given, gain = call.arguments, call.gain
    assert gain is not None  # a layer without an output projection has no selective family
    u = given["u"][rows]
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = step_sizes(given["delta"][rows].to(dtype), given.get("delta_bias"), given.get("delta_softplus", False))
    B, C = (given[name][rows].to(dtype) for name in ("B", "C"))
    B, C = (vectors if vectors.dim() == 4 else vectors[:, None] for vectors in (B, C))
    groups = max(B.shape[1], C.shape[1])
    B, C = (vectors.expand(-1, groups, -1, -1) for vectors in (B, C))
    gain = gain[rows]
    if "z" in given:
        gain = gain * F.silu(given["z"][rows].to(dtype)).abs()
    gain = gain.to(dtype).unflatten(1, (groups, -1)).permute(3, 0, 1, 2)
    return SelectiveInputs(u.to(dtype), delta, given["A"].to(dtype), B, C, gain, _real_tokens(gain, mask))


def _selective_signals(call: Call, mask: Tensor | None) -> Signals:
    batch, _, length = call.arguments["u"].shape
    rows, every = sample((batch, length), mask, call.arguments["A"].shape[1], costly=True)
    seen = selective_inputs(call, rows, mask)
    groups = seen.B.shape[1]
    channels = seen.u.shape[1] // groups
    parts = [slice(group * channels, (group + 1) * channels) for group in range(groups)]
    streams = [
        selective_states(seen.u[:, part], seen.delta[:, part], seen.A[part], seen.B[:, group])
        for group, part in enumerate(parts)
    ]
    B, C = (vectors.permute(0, 3, 1, 2) for vectors in (seen.B, seen.C))
    return Signals(_together(streams, every), every, seen.gain, B, C, seen.mask)


def _together(streams: list[Iterator[Tensor]], every: int) -> Iterator[Tensor]:
    """The states of all groups after every so many steps; chunks have a multiple of them, but for the last."""
    kept = slice(every - 1, None, every)
    if len(streams) == 1:  # most layouts: no copy
        return (chunk[kept].unsqueeze(2) for chunk in streams[0])
    return (torch.stack([chunk[kept] for chunk in chunks], dim=2) for chunks in zip(*streams, strict=True))


def _ssd_signals(call: Call, mask: Tensor | None) -> Signals:
    given, gain = call.arguments, call.gain
    assert gain is not None  # as above
    groups = given["B"].shape[2]
    rows, every = sample(given["x"].shape[:2], mask, given["B"].shape[-1])
    x = given["x"][rows]
    dtype = torch.promote_types(x.dtype, torch.float32)
    B, C = (given[name][rows].to(dtype) for name in ("B", "C"))
    gain = gain[rows]
    if "z" in given:
        gain = gain * F.silu(given["z"][rows].to(dtype)).abs()
    gain = gain.to(dtype).transpose(0, 1).unflatten(2, (groups, -1)).flatten(3, 4)
    options = {name: given[name] for name in ("dt_bias", "dt_softplus", "dt_limit") if name in given}
    options |= {name: given[name][rows] for name in ("seq_idx", "initial_states") if name in given}
    chunks = ssd_states(x.to(dtype), given["dt"][rows], given["A"], B, every=every, **options)
    states = (chunk.unflatten(2, (groups, -1)).flatten(3, 4) for chunk in chunks)
    return Signals(states, every, gain, B, C, _real_tokens(gain, mask))


def _mamba3_signals(call: Call, mask: Tensor | None) -> Signals:
    """As the recurrence uses them: every head has input and read-out of its own, after bias and rotation."""
    given, gain = call.arguments, call.gain
    assert gain is not None  # as above
    if given.get("cu_seqlens") is not None or given.get("Input_States") is not None:
        raise ValueError("its rows hold several texts (cu_seqlens), or begin with states of earlier ones")
    rows, every = sample(given["x"].shape[:2], mask, given["B"].shape[-1])
    x = given["x"][rows]
    dtype = torch.promote_types(x.dtype, torch.float32)
    names = ("B", "C", "ADT", "DT", "Trap", "Angles")
    B, C, ADT, DT, trap, angles = (given[name][rows].detach().to(dtype) for name in names)
    k, q = (
        rotated(vectors, given[bias].detach().to(dtype), angles, DT)
        for vectors, bias in ((B, "K_bias"), (C, "Q_bias"))
    )
    gain = gain[rows]
    if "z" in given:
        gain = gain * F.silu(given["z"][rows].to(dtype)).abs()
    gain = gain.to(dtype).transpose(0, 1)
    chunks = trapezoidal_states(x.to(dtype), k, ADT, DT, trap, every)
    return Signals(chunks, every, gain, k, q, _real_tokens(gain, mask))


def _linear_attention_signals(call: Call, mask: Tensor | None) -> Signals:
    """As the delta rule and GLA use them: after the L2 norm, and after the scale of the read-out, which a cut keeps.

    The states of all value heads of a key head are the channels of its group.
    """
    given, gain = call.arguments, call.gain
    assert gain is not None  # as above
    groups = given["B"].shape[2]
    rows, every = sample(given["x"].shape[:2], mask, given["B"].shape[-1])
    x = given["x"][rows]
    dtype = torch.promote_types(x.dtype, torch.float32)
    k, q = (given[name][rows].to(dtype) for name in ("B", "C"))
    if given.get("use_qk_l2norm_in_kernel", False):
        k, q = unit(k), unit(q)
    g, beta = delta_gates(given, rows)
    gain = gain[rows].to(dtype).transpose(0, 1).unflatten(2, (groups, -1)).flatten(3, 4)
    first = given["initial_state"][rows] if "initial_state" in given else None
    if first is not None and given.get("state_v_first", False):
        first = first.mT
    texts = _texts(given, rows)
    if call.kind == GLA:
        chunks = linear_states(k, x.to(dtype), given["g"][rows], first, every, texts)
    else:
        chunks = delta_states(k, x.to(dtype), g, beta, initial_state=first, every=every, seq_idx=texts)
    states = (chunk.unflatten(2, (groups, -1)).movedim(4, -1).flatten(3, 4) for chunk in chunks)
    return Signals(states, every, gain, k, q * q.shape[-1] ** -0.5, _real_tokens(gain, mask))


def _texts(given: Mapping[str, Any], rows: slice) -> Tensor | None:
    """The text of every step `(batch, length)`, where a call is told of several in a row.

    Raises:
        ValueError: if texts of one row begin with states of earlier ones.
    """
    if "seq_idx" in given:
        return given["seq_idx"][rows]
    if "cu_seqlens" not in given:
        return None
    if "initial_state" in given:
        raise ValueError("its rows hold several texts (cu_seqlens), which begin with states of earlier ones")
    ends, x = given["cu_seqlens"][1:], given["x"]
    steps = torch.arange(x.shape[1], device=x.device)
    return torch.bucketize(steps, ends.to(steps), right=True).expand(x.shape[0], -1)[rows]


def unrepeated(call: Call, groups: int) -> Call:
    """A call with each key head once; before 5.24 transformers repeated them for their value heads."""
    if call.kind != DELTA or call.arguments["B"].shape[2] <= groups or call.arguments["B"].shape[2] % groups:
        return call
    every = call.arguments["B"].shape[2] // groups
    once = {name: call.arguments[name][:, :, ::every] for name in ("B", "C")}
    return replace(call, arguments={**call.arguments, **once})


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1, as the delta rule's kernels make them."""
    return vectors * torch.rsqrt(vectors.square().sum(dim=-1, keepdim=True) + L2_EPS)


def delta_gates(given: Mapping[str, Any], rows: slice) -> tuple[Tensor | None, Tensor | None]:
    """Log decay and step, `(batch, length, heads)` or with an axis of states, as a recurrence uses them.

    fla's kernels take both before their activations, if they are told so. With a lower bound they need no rate.
    """
    g, beta = (None if given.get(name) is None else given[name][rows].float() for name in ("g", "beta"))
    if g is not None and given.get("use_gate_in_kernel", False):
        if "dt_bias" in given:
            g = g + given["dt_bias"].detach().float().view(g.shape[2:])
        lower, rate = given.get("lower_bound"), torch.ones((), device=g.device)
        if "A_log" in given:
            rate = given["A_log"].detach().float().exp().view(-1, *[1] * (g.dim() - 3))
        g = -rate * F.softplus(g) if lower is None else lower * torch.sigmoid(rate * g)
    if beta is not None and given.get("use_beta_sigmoid_in_kernel", False):
        beta = beta.sigmoid() * (2 if given.get("allow_neg_eigval", False) else 1)
    return g, beta


def _mlstm_signals(call: Call, mask: Tensor | None) -> Signals:
    """Every head is a group; its states are those that are read out, over the normaliser."""
    given, gain = call.arguments, call.gain
    assert gain is not None  # as above
    B, C, x = (given[name].transpose(1, 2) for name in ("B", "C", "x"))
    rows, every = sample(x.shape[:2], mask, B.shape[-1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    B, C, x, igate, fgate = (each[rows].to(dtype) for each in (B, C, x, given["igate"], given["fgate"]))
    gain = gain[rows].to(dtype).permute(2, 0, 1, 3)
    first = [given[name][rows] for name in ("c_initial", "n_initial", "m_initial") if name in given]
    start = (first[0], first[1], first[2]) if first else None
    states = mlstm_states(C, B, x, igate, fgate, start, every)
    return Signals(states, every, gain, B, C, _real_tokens(gain, mask))


def _real_tokens(gain: Tensor, mask: Tensor | None) -> Tensor:
    """1 at the tokens of a call that are heard, 0 at padding, `(batch, length)`."""
    if mask is None:
        return gain.new_ones(gain.shape[1], gain.shape[0])
    return (gain.flatten(2) != 0).any(dim=-1).T.to(gain.dtype)
