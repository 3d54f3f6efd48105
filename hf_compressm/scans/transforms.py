"""Whether a scan runs inside a transform of `torch.func`, where the fast versions give way.

The fast scans are autograd functions with a backward of their own, which fill buffers in place. `grad`, `vmap`, `jvp`
and what is built on them need operations that they can see through: the plain recurrences.
"""

import torch


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is active. torch has no public name for what `autograd.Function` asks."""
    return torch._C._are_functorch_transforms_active()
