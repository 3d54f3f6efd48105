"""Whether a scan runs inside a transform of `torch.func`, where the fast versions give way, or is exported.

The fast scans are operators with a backward of their own, which fill buffers in place. `grad`, `vmap`, `jvp`
and what is built on them need operations that they can see through: the plain recurrences. So does forward-mode
differentiation (`torch.autograd.forward_ad`), for which an operator would count as a constant.
"""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward mode, is active; torch has no public name for either."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_exported() -> bool:
    """Whether `torch.export` records the program; in torch 2.9 `is_exporting` is true under any compiler."""
    return torch.compiler._is_exporting_flag
