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


def apply_in_order(value: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """`apply_map` with the same bits on every machine, in float64 on the CPU.

    Libraries for matrices add up in an order that depends on the processor. Here the terms of an entry are added one
    by one, by ascending old index, zeros left out: it costs little for maps that select most rows and mix some.

    Args:
        value: any tensor without gradients.
        matrix: a map in one of the float64 forms above.
        dim: the axis; not 0 for a map with groups.
    """
    value = value.cpu().double()
    if matrix.dim() == 0:
        return matrix * value
    if matrix.dim() == 3:
        parts = zip(_blocks(value, matrix), matrix, strict=True)
        return torch.cat([apply_in_order(part, one, dim) for part, one in parts])
    old = value.movedim(dim, 0)
    new = old.new_zeros(matrix.shape[0], *old.shape[1:])
    counts = (matrix != 0).sum(dim=1)
    columns = (matrix != 0).byte().argsort(dim=1, descending=True, stable=True)
    for term in range(int(counts.max())):
        rows = (counts > term).nonzero().flatten()
        places = columns[rows, term]
        new[rows] += matrix[rows, places].view(-1, *[1] * (old.dim() - 1)) * old[places]
    return new.movedim(0, dim)


def float64(parameter: Tensor) -> Tensor:
    """The parameter in float64 on the CPU, without gradients."""
    return parameter.detach().cpu().double()


def _blocks(value: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
    """Axis 0 in as many equal blocks as there are maps."""
    return value.chunk(matrix.shape[0])
