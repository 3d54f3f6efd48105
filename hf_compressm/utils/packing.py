"""Tensors in few bytes, for what processes send to each other.

What a cut selects is told by runs of indices, and what it folds by matrices that hold little but zeros. Steps between
indices, and zeros, are packed to next to nothing; a tensor full of other numbers is sent as it is. A view is sent
without the rest of the memory that it looks into.
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


MOSTLY_ZEROS = 0.5
"""Share of zeros from which on a tensor is packed: the time for packing others would not pay."""


def is_packable(value: Any) -> bool:
    """Whether a value is a plain tensor on the CPU, without gradients."""
    return (
        type(value) is Tensor
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.requires_grad
        and not value.is_quantized
    )


def pack(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[bytes, torch.dtype, torch.Size, bool]]:
    """A packable tensor as a function and its arguments, as `pickle` wants them."""
    flat = tensor.resolve_conj().resolve_neg().flatten()
    zeros = 1 - float(flat.count_nonzero()) / max(1, flat.numel())
    small = flat.dtype == torch.int64 or zeros >= MOSTLY_ZEROS
    if flat.dtype == torch.int64:
        flat = flat.diff(prepend=flat.new_zeros(1))
    bits = flat.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
    return unpack, (zlib.compress(bits, 1) if small else bits, tensor.dtype, tensor.shape, small)


def unpack(bits: bytes, dtype: torch.dtype, shape: torch.Size, is_small: bool) -> Tensor:
    """The tensor that was packed, to the last bit."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    plain = zlib.decompress(bits) if is_small else bits
    flat = torch.frombuffer(bytearray(plain), dtype=torch.uint8).view(dtype)
    return (flat.cumsum(0) if dtype == torch.int64 else flat).view(shape)
