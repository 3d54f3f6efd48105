"""Finding, before a cut, what would keep parameters from before it: averages of the weights, and lists of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer
from transformers.utils import logging

from hf_compressm.families import find_layers
from hf_compressm.surgery import held_parameter


logger = logging.get_logger(__name__)

_AVERAGING = re.compile(r"(?<![A-Z])B?EMA(?![a-z])|Ema(?![a-z])|SyncRefModel")
"""Parts of the class names of callbacks that average weights: trl's, timm's, and those that people write."""
_AVERAGES = re.compile(rf"{_AVERAGING.pattern}|MovingAverage|WeightAverag|AveragedModel|Polyak")
"""Parts of the class names of objects that are averages, if they hold tensors as large as those that are cut."""
_NAMES = re.compile(r"(?:^|_)(?:ema|swa|polyak|averaged?|averages|shadow)(?:_|$)", re.IGNORECASE)
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


def refuse_copies(trainer: Trainer, model: nn.Module, begun: bool = False) -> None:
    """Refuse callbacks and attributes of the Trainer that would keep parameters from before a cut.

    Called before the first step, when every callback has started, and before a cut, for what was made since: then a
    list of parameters may be made anew at every step, so it is only named.

    Args:
        trainer: the Trainer.
        model: its model.
        begun: whether steps were done since the start.

    Raises:
        ValueError: naming callback or attribute, and the way out.
    """
    parameters = [parameter for layer in find_layers(model) for parameter in layer.module.parameters()]
    for callback in trainer.callback_handler.callbacks:
        name = type(callback).__name__
        if any(_AVERAGING.search(kind.__name__) for kind in type(callback).__mro__):
            raise ValueError(
                f"{name} averages the weights over time, and the sums that it keeps have the sizes from before a cut. "
                "Leave it out while CompreSSMCallback cuts. To average the weights of the smaller model, train on "
                "with it and without CompreSSMCallback."
            )
        _refuse(name, vars(callback), parameters, begun)
    own = {name: value for name, value in vars(trainer).items() if name not in _OF_THE_TRAINER}
    _refuse(type(trainer).__name__, own, parameters, begun)


def _refuse(owner: str, attributes: Mapping[str, Any], parameters: Sequence[nn.Parameter], begun: bool) -> None:
    own = {id(parameter) for parameter in parameters}
    for name, value in attributes.items():
        values = [(name, value), *_contents(name, value)]
        is_average = any(_is_average(inner, kept, parameters) for inner, kept in values)
        if not is_average and not held_parameter({str(place): kept for place, (_, kept) in enumerate(values)}, own):
            continue
        message = (
            f"{owner}.{name} holds parameters or averages of the model, and would keep those from before a cut. "
            "Look parameters up by name in the model at every step, average the weights in a run without "
            "CompreSSMCallback, or leave this out while CompreSSMCallback cuts."
        )
        if is_average or not begun:
            raise ValueError(message)
        logger.warning(message)


def _contents(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The first members of a collection, and the attributes of an object that people have written themselves."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, dict):
        yield from ((str(key), member) for key, member in islice(value.items(), _MEMBERS))
    elif isinstance(value, list | tuple | set):
        yield from ((name, member) for member in islice(value, _MEMBERS))
    elif package not in _OTHERS and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from vars(value).items()


def _is_average(name: str, value: Any, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a value is an average of the weights, by its class, or by a name and tensors as large as the layers'."""
    if isinstance(value, AveragedModel):
        return True
    if not _NAMES.search(name) and not any(_AVERAGES.search(kind.__name__) for kind in type(value).__mro__):
        return False
    sizes = {parameter.shape for parameter in parameters}
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
