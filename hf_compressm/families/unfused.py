"""The parts of functions that fuse a recurrence with what is around it, so that a layer can be measured.

They take the arguments of mamba-ssm's functions (Gu and Dao, arXiv 2312.00752, section 3.4):

| argument | meaning | shape |
|---|---|---|
| xz | input of convolution, and gate | `(batch, 2 channels, length)` |
| conv1d_weight, conv1d_bias | convolution | `(channels, 1, taps)`, `(channels,)` |
| x_proj_weight | projection to step, B and C | `(rank + 2 N, channels)` |
| delta_proj_weight, delta_bias | step sizes | `(channels, rank)`, `(channels,)` |
| A | continuous-time decay | `(channels, N)` |
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


_BEFORE = ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight")
_PROJECTION = ("out_proj_weight", "out_proj_bias")
_AFTER = ("A", "B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias", "delta_softplus")
_NORMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")


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
