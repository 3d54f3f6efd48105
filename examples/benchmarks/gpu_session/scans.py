"""The selective scan alone: against float64, and its time."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from gpu_session import roofline
from gpu_session.scale import Scale
from gpu_session.timing import milliseconds, peak_memory
from gpu_session.ways import reason_against
from torch import Tensor

from hf_compressm.scans import selective_scan, selective_scan_reference


RUNS = 3
"""That must give the same bits."""


def inputs(
    shape: tuple[int, int, int], size: int, dtype: torch.dtype, device: str, without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Arguments of `selective_scan` that want gradients, laid out as a modeling file hands them over.

    Args:
        shape: batch, channels, length.
        size: N.
        dtype: of sequences; A, D and the bias are float32.
        device: its type.
        without: names of arguments to leave out.
    """
    batch, channels, length = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    sequences = {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length) - 3,
        "B": draw(batch, length, size).transpose(1, 2),
        "C": draw(batch, length, size).transpose(1, 2),
        "z": draw(batch, length, channels).transpose(1, 2),
    }
    weights = {"A": -torch.exp(draw(channels, size)), "D": draw(channels), "delta_bias": 0.3 * draw(channels)}
    tensors = weights | {name: tensor.to(dtype) for name, tensor in sequences.items()}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items() if name not in without}


def scan_of(way: str) -> Callable[..., Any]:
    """The function of a way; the process is left with that way."""
    if way == "mamba-ssm":
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return selective_scan


def outcome(scan: Callable[..., Any], arguments: dict[str, Tensor], through_last: bool) -> dict[str, Tensor]:
    """Output, last state, and the gradients of a weighted sum of the output, and of the last state too if asked."""
    out, last = scan(**arguments, delta_softplus=True, return_last_state=True)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    total = (out * weights).sum() + (last.sum() if through_last else 0)
    gradients = torch.autograd.grad(total, list(arguments.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(arguments, gradients, strict=True)}
    return {"out": out.detach(), "last state": last.detach()} | named


def errors(way: str, size: int, scale: Scale, dtype: str) -> dict[str, Any]:
    """Largest error of each result against float64, relative to its largest entry, and whether runs agree bit for bit.

    The reference takes the same rounded arguments, step by step. The kernel of mamba-ssm gives no gradient of the last
    state.
    """
    absent = reason_against(way, "scan", scale.device)
    if absent:
        return {"absent": absent}
    arguments = inputs(scale.checked[size], size, getattr(torch, dtype), scale.device)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in arguments.items()}
    through_last = way != "mamba-ssm"
    expected = outcome(selective_scan_reference, exact, through_last)
    found, *others = [outcome(scan_of(way), arguments, through_last) for _ in range(RUNS)]
    by_name = {name: _relative(found[name], expected[name]) for name in expected}
    same = all(torch.equal(found[name], other[name]) for other in others for name in found)
    return {"errors": by_name, "same bits": same}


def _relative(found: Tensor, expected: Tensor) -> float:
    """Largest error in the largest entry."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def times(way: str, size: int, scale: Scale) -> dict[str, Any]:
    """Milliseconds of forward, and of forward and backward; for our kernels the share of their roofline."""
    absent = reason_against(way, "scan", scale.device)
    if absent:
        return {"absent": absent}
    arguments, scan = inputs(scale.scanned, size, torch.bfloat16, scale.device), scan_of(way)
    weights = torch.randn(scale.scanned, device=scale.device).bfloat16()

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(**arguments, delta_softplus=True)

    def both() -> tuple[Tensor, ...]:
        out = scan(**arguments, delta_softplus=True)
        return torch.autograd.grad(out, list(arguments.values()), weights)

    alone = milliseconds(forward, scale.device, scale.repeats)
    found = {"forward": alone, "milliseconds": milliseconds(both, scale.device, scale.repeats)}
    found |= {"peak": peak_memory(scale.device)}
    if way == "triton" and scale.device == "cuda":
        least = roofline.least_milliseconds(scale.scanned, size, torch.cuda.get_device_properties(0))
        if least is not None:
            found |= {"forward share": least[0] / found["forward"], "share": least[1] / found["milliseconds"]}
    return found
