"""The selective scan in one operator, bias, softplus, D and gate included: for GPUs, by the kernels of Triton.

Glossary: symbols as in `selective.py`, but with the channels side by side: u, delta and z are (batch, length,
channels).
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from .operators import Recurrence, like, register
from .selective_chunks import chunked_selective_scan
from .transforms import is_transformed
from .trials import Trial, working_kernel


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_SEQUENCES = 65535  # programs along the second and third axis of a grid
LONGEST = 65535 * 128  # steps, in segments of 128
TRIAL_STEPS = 140  # two segments, the second one not full


def fits(u: Tensor, A: Tensor) -> bool:
    """Whether u (batch, channels, length) and A (channels, N) make a grid of programs that a GPU can start."""
    batch, _, length = u.shape
    return 0 < u.numel() and 0 < A.numel() and batch <= MOST_SEQUENCES and length <= LONGEST


@torch.compiler.assume_constant_result
def has_kernel(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels take inputs of a dtype and give the right results on a device; the first call tries it."""
    return dtype in DTYPES and not is_transformed() and working_kernel(TRIAL, device, dtype) is not None


def fused_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of B and C that all channels share: out, and the last state (batch, channels, N)."""
    z = None if z is None else z.transpose(1, 2)
    out, last_state, _ = _scan(u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return out.transpose(1, 2), last_state.transpose(1, 2)


def _run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out as u, the last state (batch, N, channels), and the states before each segment."""
    return _kernels().selective_forward(u, delta, A, B, C, D, z, bias, softplus)


def _run_back(
    grad_out: Tensor | None,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    starts: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all tensors."""
    return _kernels().selective_backward(grad_out, grad_last, u, delta, A, B, C, D, z, bias, starts, softplus)


def _run_shapes(u: Tensor, delta: Tensor, A: Tensor, *others: Tensor | bool | None) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `_run`, not filled."""
    batch, length, channels = u.shape
    segment, N = _kernels().SEGMENT, A.shape[1]
    segments = (length + segment - 1) // segment
    sizes = (batch, N, channels), (batch, segments, N, channels)
    last, starts = (torch.empty(size, dtype=torch.float32, device=u.device) for size in sizes)
    return u.new_empty(u.shape), last, starts


_scan = register(
    "selective_scan",
    Recurrence(
        _run,
        _run_back,
        shapes=_run_shapes,
        backward_shapes=lambda grad_out, grad_last, *saved: like(*saved[:8]),
        tensors=8,
        results=2,
    ),
)


def _kernels() -> ModuleType:
    """The module of kernels; it needs Triton."""
    return importlib.import_module(f"{__package__}.selective_triton")


def _trial_results(kernel: ModuleType | None, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output, last state and gradients of a small scan, by the kernels, or by plain PyTorch in float64.

    Float64, since TF32 and autocast, where they are on, would take more from a product in float32 than a trial allows.
    """
    batch, channels, N = 2, 16, 3

    def wave(*shape: int) -> Tensor:
        return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32, device=device)).view(shape)

    by_step = (wave(batch, TRIAL_STEPS, channels).to(dtype) for _ in range(3))
    u, delta, z = (tensor * (1 + i) for i, tensor in enumerate(by_step))
    A, D, bias = -1 - wave(channels, N), wave(channels), wave(channels)
    B, C = wave(batch, N, TRIAL_STEPS).to(dtype), 0.5 - wave(batch, N, TRIAL_STEPS).to(dtype)
    tensors = [u, delta, A, B, C, D, z, bias]
    grads = wave(batch, TRIAL_STEPS, channels).to(dtype), wave(batch, N, channels)
    if kernel is not None:
        out, last, starts = kernel.selective_forward(*tensors, True)
        return [out, last, *kernel.selective_backward(*grads, *tensors, starts, True)]
    with torch.inference_mode(False), torch.enable_grad():
        tensors = [tensor.double().requires_grad_() for tensor in tensors]
        u, delta, A, B, C, D, z, bias = tensors
        u, delta, z = (tensor.transpose(1, 2) for tensor in (u, delta, z))
        out, last = chunked_selective_scan(u, delta, A, B, C, D, z, bias, True)
        out, last = out.transpose(1, 2), last.transpose(1, 2)
        return [out, last, *torch.autograd.grad((out, last), tensors, [grad.double() for grad in grads])]


TRIAL = Trial("selective_triton", "selective scans (Mamba-1 layers)", _trial_results)
