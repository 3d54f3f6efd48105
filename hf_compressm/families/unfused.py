"""The parts of functions that fuse a recurrence with what is around it, so that a layer can be measured.

They take the arguments of mamba-ssm's functions (Gu and Dao, arXiv 2312.00752, section 3.4; Dao and Gu, arXiv
2405.21060, section 7.1):

| argument | meaning | shape |
|---|---|---|
| xz | input of convolution, and gate | `(batch, 2 channels, length)` |
| conv1d_weight, conv1d_bias | convolution; Mamba-2's has no middle axis | `(channels, 1, taps)`, `(channels,)` |
| x_proj_weight | projection to step, B and C | `(rank + 2 N, channels)` |
| delta_proj_weight, delta_bias | step sizes | `(channels, rank)`, `(channels,)` |
| A | continuous-time decay | `(channels, N)`, Mamba-2 `(heads,)` |
| zxbcdt | gate and input of the MLP beside the scan, gate, x, B, C, step | `(batch, length, 2 mlp + ... + heads)` |
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compressm.scans.convolution import packed_convolution


_BEFORE = ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight")
_PROJECTION = ("out_proj_weight", "out_proj_bias")
_AFTER = ("A", "B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias", "delta_softplus")
_NORMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")
_COMBINED = (
    *("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "chunk_size", "initial_states", "seq_idx"),
    *("dt_limit", "return_final_states", "activation", "rmsnorm_weight", "rmsnorm_eps", "outproj_weight"),
    *("outproj_bias", "headdim", "ngroups", "norm_before_gate"),
)
"""Names of arguments, in their order."""
_PASSED_ON = ("initial_states", "seq_idx", "dt_limit", "return_final_states")


def not_available(*args: Any, **kwargs: Any) -> None:
    """What modeling files take as: there is no fused function, run the parts."""


def mamba_inner_fn_no_out_proj(scan: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Convolution, projection and gated scan, `(batch, channels, length)`.

    Args:
        scan: what takes the place of `selective_scan_fn`.
        *args: the arguments of the fused function.
        **kwargs: further ones.

    Raises:
        ValueError: for norms of B, C and step, which only the fused function has.
    """
    return _gated_scan(scan, dict(zip((*_BEFORE, *_AFTER), args, strict=False)) | kwargs)


def mamba_inner_fn(
    scan: Callable[..., Tensor], heard: Callable[[Tensor, Tensor], Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """All of a Mamba block after its input projection, `(batch, length, hidden)`.

    Args:
        scan: what takes the place of `selective_scan_fn`.
        heard: is given the input of the output projection and its weight, and returns the input.
        *args: the arguments of the fused function.
        **kwargs: further ones.

    Raises:
        ValueError: as above.
    """
    given = dict(zip((*_BEFORE, *_PROJECTION, *_AFTER), args, strict=False)) | kwargs
    weight = given["out_proj_weight"]
    return F.linear(heard(_gated_scan(scan, given).mT, weight), weight, given.get("out_proj_bias"))


def _gated_scan(scan: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
    if any(given.get(name) is not None for name in _NORMS):
        raise ValueError(f"mamba_inner_fn is called with one of {', '.join(_NORMS)}, which only its kernel knows.")
    u, z = given["xz"].chunk(2, dim=1)
    weight, step_weight = given["conv1d_weight"], given["delta_proj_weight"]
    padding = weight.shape[-1] - 1
    u = F.silu(F.conv1d(u, weight, given["conv1d_bias"], padding=padding, groups=u.shape[1])[..., : z.shape[-1]])
    size = given["A"].shape[-1]
    step, *projected = F.linear(u.mT, given["x_proj_weight"]).split([step_weight.shape[1], size, size], dim=-1)
    vectors = []
    for name, rows in zip(("B", "C"), projected, strict=True):
        bias = given.get(f"{name}_proj_bias")
        own = (rows if bias is None else rows + bias.to(rows.dtype)).mT
        vectors.append(own if given.get(name) is None else given[name])
    delta, softplus = step_weight @ step.mT, given.get("delta_softplus", True)
    return scan(u, delta, given["A"], *vectors, given.get("D"), z, given.get("delta_bias"), softplus)


def mamba_split_conv1d_scan_combined(
    scan: Callable[..., Any], heard: Callable[[Tensor, Tensor], Tensor], *args: Any, **kwargs: Any
) -> Any:
    """All of a Mamba-2 block after its input projection, `(batch, length, hidden)`.

    Args:
        scan: what takes the place of `mamba_chunk_scan_combined`.
        heard: is given the input of the output projection and its weight, and returns the input.
        *args: the arguments of the fused function.
        **kwargs: further ones.

    Returns:
        The output, with `return_final_states` also the last state; without a projection, what would be its input.
    """
    given = dict(zip(_COMBINED, args, strict=False)) | kwargs
    z0, x0, z, xBC, dt = given["zxbcdt"].split(_widths(given), dim=-1)
    heads, groups, width = dt.shape[-1], given.get("ngroups", 1), z.shape[-1]
    has_activation = given.get("activation", "silu") in ("silu", "swish")
    xBC = _convolved(xBC, given["conv1d_weight"], given["conv1d_bias"], given.get("seq_idx"))
    states = (xBC.shape[-1] - width) // 2
    x, B, C = (F.silu(xBC) if has_activation else xBC).split([width, states, states], dim=-1)
    norm = given.get("rmsnorm_weight")
    result = scan(
        x.unflatten(-1, (heads, -1)),
        dt,
        given["A"],
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        given["chunk_size"],
        D=given["D"],
        z=z.unflatten(-1, (heads, -1)) if norm is None else None,
        dt_bias=given["dt_bias"],
        dt_softplus=True,
        **{name: given[name] for name in _PASSED_ON if name in given},
    )
    y, *others = result if isinstance(result, tuple) else (result,)
    y = y.flatten(2)
    if norm is not None:
        eps, is_first = given.get("rmsnorm_eps", 1e-6), given.get("norm_before_gate", True)
        y = _gated_norm(y, z, norm, eps, groups, is_first)
    y = torch.cat([F.silu(z0) * x0, y], dim=-1) if z0.shape[-1] else y
    weight = given.get("outproj_weight")
    out = y if weight is None else F.linear(heard(y, weight), weight, given.get("outproj_bias"))
    return (out, *others) if others else out


def _widths(given: dict[str, Any]) -> list[int]:
    """Widths in `zxbcdt`: gate and input of the MLP, gate, what is convolved, step."""
    D, convolved = given["D"], int(given["conv1d_weight"].shape[0])
    heads = int(D.shape[0])
    width = D.numel() if D.dim() == 2 else heads * int(given["headdim"])
    mlp = (int(given["zxbcdt"].shape[-1]) - width - convolved - heads) // 2
    return [mlp, mlp, width, convolved, heads]


def _convolved(signal: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The causal convolution of `(batch, length, channels)`, which does not reach into another text of a row."""
    if seq_idx is not None:
        return packed_convolution(signal.mT, weight, bias, seq_idx=seq_idx).mT
    length, taps = signal.shape[1], weight.shape[-1]
    return F.conv1d(signal.mT, weight[:, None], bias, padding=taps - 1, groups=len(weight))[..., :length].mT


def _gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, is_first: bool) -> Tensor:
    """A root-mean-square norm of each group of channels, before or after the gate."""
    dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
    y, gate = y.to(wide), F.silu(z.to(wide))
    grouped = (y if is_first else y * gate).unflatten(-1, (groups, -1))
    y = (grouped * (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight
    return (y * gate if is_first else y).to(dtype)
