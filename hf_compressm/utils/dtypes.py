"""Which number types a device has."""

import torch


def summing_dtype(device: torch.device) -> torch.dtype:
    """Float64 where the device has it, and float32 elsewhere: the type for long sums and small differences."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
