"""Engines that own or split the parameters of a model, so that no cut can happen in place."""

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_compressm.surgery import find_wrappers, unsupported_feature


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and `torch.compile`."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
    inner = inner if inner is not None else getattr(model, "_orig_mod", None)
    return inner_model(inner) if isinstance(inner, nn.Module) else model


def called_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, compiled or not: it is called with inputs on its own device."""
    return called_model(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def find_engine(model: nn.Module, wrapped: nn.Module, world_size: int) -> str:
    """The engine under which a model cannot be cut in place, in words; "" where it can.

    Args:
        model: the model itself.
        wrapped: the model as it is trained.
        world_size: number of processes that train it together.
    """
    parts = list(wrapped.modules())
    if any(type(part).__module__.partition(".")[0] == "deepspeed" for part in parts):
        return "DeepSpeed"
    if any(isinstance(part, FullyShardedDataParallel) for part in parts):
        return "FSDP"
    if any(isinstance(part, nn.DataParallel) for part in parts):
        return "nn.DataParallel"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "tensor parallelism (its parameters are DTensors)"
    if getattr(model, "is_quantized", False):
        return "quantised weights"
    wrappers = list(find_wrappers(wrapped))
    feature = next((found for wrapper in wrappers if (found := unsupported_feature(wrapper))), "")
    if feature:
        return f"DistributedDataParallel with {feature}"
    if world_size > 1 and not wrappers and any(parameter.requires_grad for parameter in model.parameters()):
        return f"{world_size} processes without DistributedDataParallel"
    return ""
