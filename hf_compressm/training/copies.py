"""Finding, before a cut, what would keep parameters from before it: averages of the weights, and lists of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer

from hf_compressm.families import find_layers
from hf_compressm.surgery import held_parameter


_AVERAGING = re.compile(r"(?<![A-Z])B?EMA(?![a-z])|Ema(?![a-z])|SyncRefModel")
"""Parts of the class names of callbacks that average weights: trl's, timm's, and those that people write."""
_AVERAGES = re.compile(rf"{_AVERAGING.pattern}|MovingAverage|WeightAverag|AveragedModel|Polyak")
"""Parts of the class names of objects that are averages, if they hold tensors as large as those that are cut."""
_NAMES = re.compile(r"(?:^|_)(?:ema|swa|polyak|averaged?|shadow)(?:_|$)", re.IGNORECASE)
"""Attributes that hold averages, by name, on the same condition."""
_OF_THE_TRAINER = frozenset(
    {"model", "model_wrapped", "optimizer", "lr_scheduler", "optimizer_cls_and_kwargs", "callback_handler"}
    | {"accelerator", "args", "state", "control", "train_dataset", "eval_dataset", "processing_class"}
)
"""A Trainer's own attributes: those that follow a cut, and those that have nothing of the model."""
_OTHERS = ("torch", "transformers", "accelerate", "trl", "builtins")
"""Packages whose objects are not looked into."""
_MEMBERS = 100
"""How many members of a collection are looked into; it may be a dataset."""


@dataclass(frozen=True, eq=False)
class _Watched:
    """The parameters of the SSM layers, and all of the model in order."""

    parameters: Mapping[str, nn.Parameter]  # of the layers, by name
    lists: Sequence[list[torch.Size]]  # shapes of all parameters, and of the trained ones

    @classmethod
    def of(cls, model: nn.Module) -> "_Watched":
        own = {
            f"{layer.name}.{name}": parameter
            for layer in find_layers(model)
            for name, parameter in layer.module.named_parameters()
        }
        every = list(model.parameters())
        return cls(own, [[p.shape for p in every], [p.shape for p in every if p.requires_grad]])


def refuse_copies(trainer: Trainer, model: nn.Module) -> None:
    """Refuse callbacks and attributes of the Trainer that would keep parameters from before a cut.

    Called before the first step, when every callback has started, and before a cut, for what was made since.

    Raises:
        ValueError: naming callback or attribute, and the way out.
    """
    watched = _Watched.of(model)
    for callback in trainer.callback_handler.callbacks:
        name = type(callback).__name__
        if any(_AVERAGING.search(kind.__name__) for kind in type(callback).__mro__):
            raise ValueError(
                f"{name} averages the weights over time, and the sums that it keeps have the sizes from before a cut. "
                "Leave it out while CompreSSMCallback cuts. To average the weights of the smaller model, train on "
                "with it and without CompreSSMCallback."
            )
        _refuse(name, vars(callback), watched)
    own = {name: value for name, value in vars(trainer).items() if name not in _OF_THE_TRAINER}
    _refuse(type(trainer).__name__, own, watched)


def _refuse(owner: str, attributes: Mapping[str, Any], watched: _Watched) -> None:
    for name, value in attributes.items():
        if _keeps(name, value, watched) or any(_keeps(inner, kept, watched) for inner, kept in _contents(name, value)):
            raise ValueError(
                f"{owner}.{name} holds parameters or averages of the model, and would keep those from before a cut. "
                "Look parameters up by name in the model at every step, average the weights in a run without "
                "CompreSSMCallback, or leave this out while CompreSSMCallback cuts."
            )


def _contents(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The first members of a collection, and the attributes of an object that people have written themselves."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, dict):
        yield from ((str(key), member) for key, member in islice(value.items(), _MEMBERS))
    elif isinstance(value, list | tuple | set):
        yield from ((name, member) for member in islice(value, _MEMBERS))
    elif package not in _OTHERS and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from vars(value).items()


def _keeps(name: str, value: Any, watched: _Watched) -> bool:
    """Whether a value is a parameter, an average, or a collection of them."""
    if isinstance(value, AveragedModel):
        return True
    if held_parameter({name: value}, {id(parameter) for parameter in watched.parameters.values()}):
        return True
    if isinstance(value, dict):
        plain = {str(key).removeprefix("module."): tensor for key, tensor in value.items()}
        named = ((plain.get(key), parameter) for key, parameter in watched.parameters.items())
        if any(isinstance(tensor, Tensor) and tensor.shape == parameter.shape for tensor, parameter in named):
            return True
    if isinstance(value, list | tuple) and [getattr(tensor, "shape", None) for tensor in value] in watched.lists:
        return True
    if not _NAMES.search(name) and not any(_AVERAGES.search(kind.__name__) for kind in type(value).__mro__):
        return False
    sizes = {parameter.shape for parameter in watched.parameters.values()}
    return any(tensor.shape in sizes for tensor in _tensors(value))


def _tensors(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """The tensors of a value: of a module, of the attributes of an object, or in a collection."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif depth:
        members = value if isinstance(value, list | tuple | set) else getattr(value, "__dict__", {})
        members = value if isinstance(value, dict) else members
        for member in members.values() if isinstance(members, dict) else members:
            yield from _tensors(member, depth - 1)
