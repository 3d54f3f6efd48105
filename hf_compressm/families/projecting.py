"""Layers whose states are mixed by a cut: measured and truncated as balanced states, group by group.

| symbol | meaning | shape |
|---|---|---|
| W | projection of the input vectors, `B~ = W B` | `(groups, r, N)` |
| V | its right inverse, `C~ = V^T C`, `W V = I` | `(groups, N, r)` |

One decay multiplies all states of a group alike, so that the projection commutes with the recurrence; see
`numerics.projection`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hf_compressm.families.family import CutMethod, Measurement, SSMLayer, kept_order
from hf_compressm.families.selective import Selection
from hf_compressm.numerics import interpolation
from hf_compressm.numerics.projection import balanced_projection, projection_errors


def in_balanced_states(measured: Measurement, P: Tensor, Q: Tensor, layer: SSMLayer, method: CutMethod) -> Measurement:
    """A measurement whose states are the balanced ones.

    Args:
        measured: of the layer's own states.
        P: `(groups, N, N)`, loudness-weighted covariance of the states.
        Q: `(groups, N, N)`, covariance of the read-out.
        layer: the layer.
        method: how states are ranked.
    """
    sigma = interpolation.empirical_hankel_singular_values(P, Q)  # (groups, N)
    order = torch.arange(sigma.shape[1])[kept_order(sigma.shape[1], method, layer)]
    tails = torch.stack([projection_errors(one).square() * one.square().sum() for one in sigma]).sum(dim=0)
    detail = Selection(order.expand_as(sigma), P, Q, reads_out=False)
    return replace(measured, errors=interpolation.relative_errors(tails), detail=detail)


def projections(selection: Selection, size: int) -> tuple[Tensor, Tensor]:
    """W and V of every group, onto the first `size` states of the order."""
    kept = selection.orders[:, :size].sort(dim=-1).values
    pairs = [balanced_projection(*group) for group in zip(selection.P, selection.Q, kept, strict=True)]
    W, V = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return W, V


def projection_error(P: Tensor, Q: Tensor, W: Tensor, V: Tensor) -> float:
    """Predicted relative output error of all groups together, if states and read-out are independent."""
    defect = torch.eye(P.shape[-1], dtype=torch.float64) - V @ W
    lost = torch.einsum("gij,gji->", Q, defect @ P @ defect.mT)
    return float((lost / torch.einsum("gij,gji->", Q, P)).clamp(0, 1).sqrt())
