"""Modes of torch that a caller may have switched on, and that what is computed here must not depend on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def outside_inference() -> Iterator[None]:
    """Leave `torch.inference_mode`, whose tensors can never be trained; gradients are recorded only if they were."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            recorded = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))  # which also switches gradients on
            stack.enter_context(torch.set_grad_enabled(recorded))
        yield


@contextmanager
def plain_modes() -> Iterator[None]:
    """Compute as if no mode was on: neither inference mode nor autocast, and new tensors on the CPU.

    A default device, of `torch.set_default_device` or `with torch.device(...)`, would spread over all tensors that are
    made without one. The default dtype needs no care: every tensor here names its own.
    """
    with outside_inference(), ExitStack() as stack:
        for kind in _device_kinds():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":  # get_default_device of torch 2.9 fails once it was set to None
            stack.enter_context(torch.device("cpu"))
        yield


def _device_kinds() -> set[str]:
    """The kinds of devices that autocast may be on for."""
    accelerator = torch.accelerator.current_accelerator()
    return {"cpu"} if accelerator is None else {"cpu", accelerator.type}
