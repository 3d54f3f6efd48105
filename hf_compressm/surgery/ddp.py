"""Telling DistributedDataParallel about new parameters.

Its reducer hooks into the parameters that a model has when it is wrapped. A parameter that replaces one of them is
silently left out of the averaging of gradients (https://github.com/pytorch/pytorch/issues/12603). Training loops hold
the wrapper, so it cannot be exchanged for a new one. But a wrapper that is unpickled builds its reducer from the
model's present parameters: the same is done here to the live wrapper.
"""

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def find_wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """The DDP wrappers in a model as it is trained; `torch.compile` may have wrapped them in turn."""
    return (module for module in model.modules() if isinstance(module, DistributedDataParallel))


def unsupported_feature(wrapper: DistributedDataParallel) -> str:
    """A feature of a wrapper that holds parameters outside of its reducer, or ""."""
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "its own mixed_precision (bf16 and fp16 of Trainer are allowed)"
    if getattr(wrapper, "_delay_all_reduce_params", None):
        return "delay_all_reduce_named_params"
    if getattr(wrapper, "_use_python_reducer", False):
        return "torch._dynamo.config.optimize_ddp = 'python_reducer'"
    missing = [name for name in ("_module_parameters", "_comm_hooks") if not hasattr(wrapper, name)]
    return f"a version of torch without {missing[0]}" if missing else ""


def rebuild_reducers(model: nn.Module) -> None:
    """Make every DDP wrapper average the gradients of the parameters that its model has now.

    Call it in every process, between a step and the next forward; nothing is sent.

    Args:
        model: the model as it is trained, wrapped or not.
    """
    for wrapper in find_wrappers(model):
        hooks = list(wrapper._comm_hooks)
        wrapper.__setstate__(wrapper.__getstate__())
        wrapper._module_parameters = [
            parameter
            for name, parameter in wrapper.module.named_parameters()
            if name not in wrapper.parameters_to_ignore
        ]
        wrapper._has_rebuilt_buckets = False
        wrapper._static_graph_delay_allreduce_enqueued = False  # a new reducer records a static graph anew
        for hook, state in hooks:
            dist._register_comm_hook(wrapper.reducer, state, hook)
