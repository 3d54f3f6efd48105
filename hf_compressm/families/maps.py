"""Linear maps along one axis of a tensor: how a cut changes a parameter, and how its moments follow.

| form of a map | meaning |
|---|---|
| int64 `(new,)` | the old entries that stay |
| int64 `(groups, new)` | the same for each of as many equal blocks of axis 0 |
| float64 `(new, old)` | a matrix |
| float64 `(groups, new, old)` | one matrix for each of as many equal blocks of axis 0 |
| float64, no axis | a factor |

Not every kind of device has float64. What is computed in float64 is computed on the CPU where the device lacks it.
"""

import torch
from torch import Tensor

from hf_compressm.utils.devices import lacks_float64, to_device


def apply_map(value: Tensor, matrix: Tensor, dim: int, squared: bool = False) -> Tensor:
    """A tensor mapped along an axis: in its own dtype where entries are only selected, else in float64.

    The result is on the tensor's device, or on the CPU where that device would need float64 and has none.

    Args:
        value: any tensor.
        matrix: a map in one of the forms above.
        dim: the axis; not 0 for a map with groups.
        squared: whether to square the entries of a matrix, as for second moments.
    """
    if matrix.is_floating_point() and lacks_float64(value.device):
        value = value.cpu()
    matrix = to_device(matrix, value.device)
    if not matrix.is_floating_point():
        if matrix.dim() == 1:
            return value.index_select(dim, matrix)
        parts = zip(_blocks(value, matrix), matrix, strict=True)
        return torch.cat([part.index_select(dim, kept) for part, kept in parts])
    value = value.double()
    matrix = matrix.square() if squared else matrix
    if matrix.dim() == 0:
        return matrix * value
    if matrix.dim() == 2:
        return torch.tensordot(matrix, value, dims=([1], [dim])).movedim(0, dim)
    parts = zip(_blocks(value, matrix), matrix, strict=True)
    return torch.cat([torch.tensordot(one, part, dims=([1], [dim])).movedim(0, dim) for part, one in parts])


def float64(parameter: Tensor) -> Tensor:
    """The parameter in float64 on the CPU, without gradients."""
    return parameter.detach().cpu().double()


def _blocks(value: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
    """Axis 0 in as many equal blocks as there are maps."""
    return value.chunk(matrix.shape[0])
