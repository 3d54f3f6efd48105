"""Telling DistributedDataParallel about new parameters.

Its reducer hooks itself to the parameters that a model has when it is wrapped; one that is replaced later is silently
left out of the averaging of gradients (https://github.com/pytorch/pytorch/issues/12603). Training loops hold on to
the wrapper, so that it cannot be exchanged for a new one. But it can be pickled, and builds its reducer from the
model's present parameters when it is unpickled: that is done here to the live wrapper.
"""

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def find_wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """The DDP wrappers in a model as it is trained; `torch.compile` may have wrapped them in turn."""
    return (module for module in model.modules() if isinstance(module, DistributedDataParallel))


def unsupported_feature(wrapper: DistributedDataParallel) -> str:
    """What a wrapper was asked for that holds on to parameters in other ways than its reducer; "" if nothing."""
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "mixed_precision, DDP's own (Trainer's bf16 and fp16 are others)"
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
        model: as it is trained, wrapped or not.
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
        wrapper._static_graph_delay_allreduce_enqueued = False  # a new reducer looks at a static graph again
        for hook, state in hooks:
            dist._register_comm_hook(wrapper.reducer, state, hook)
