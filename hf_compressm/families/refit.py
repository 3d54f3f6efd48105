"""Fitting a cut layer to what it gave before: its parameters move until its output is as near as it gets.

Adam on the mean square error of the layer's output, on inputs that were kept, with steps in proportion to the size of
every tensor. The layer stays of its class. Its family says which entries move, and how fast. A part of the inputs is
held out: it tells whether the fit is better, and how far the layer is from what it was.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.calls import Example
from hf_compressm.families.changes import MomentTerm, ParameterChange
from hf_compressm.families.family import LayerCut, SSMLayer
from hf_compressm.families.running import (
    Trial,
    measured,
    number_of_rows,
    relative_error,
    rows_of,
    run,
    with_cut,
)


WARMUP = 0.2
"""Share of the steps in which they grow: the first ones of Adam have the same size however good the layer is."""
HELD_OUT = 8
"""One of so many rows is held out, at least one of each example; where all have one row, the last example."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a layer is given, and what it is to answer, `(batch, length, channels)`."""

    example: Example
    wanted: Tensor


def tried(
    layer: SSMLayer, cut: LayerCut, examples: Sequence[Example], steps: int, start: LayerCut | None = None
) -> LayerCut:
    """A cut with its error as it is measured by running the layer, and refitted if that makes it smaller.

    Args:
        layer: the layer; it does not change.
        cut: what the cut writes without a fit.
        examples: inputs of the layer.
        steps: of the fit; 0 for none.
        start: the cut that is fitted, if it is another one.
    """
    error, change = measured(layer, cut, examples)
    fitted = _refitted(layer, cut, start or cut, examples, steps) if steps else None
    if fitted is not None:
        cut, error = fitted
        _, change = measured(layer, cut, examples)
    return replace(cut, predicted_error=error, energy_kept=max(0.0, 1 - error**2), loss_change=change)


def _refitted(
    layer: SSMLayer, cut: LayerCut, start: LayerCut, examples: Sequence[Example], steps: int
) -> tuple[LayerCut, float] | None:
    """`start` with fitted values, and its error on what was held out; None if `cut` is as good there."""
    taught, asked = _lessons(layer.module, examples)
    before = _error(_in_float32(with_cut(layer, cut).module), asked)
    for rate in layer.family.refit_rates:
        trial = with_cut(layer, start)
        module = _in_float32(trial.module)
        own = {id(parameter): parameter for parameter in module.parameters()}
        free = {own[id(tensor)]: pace for tensor, pace in layer.family.fitted(module) if id(tensor) in own}
        if not free:
            return None
        fit(module, free, taught, steps, rate)
        after = _error(module, asked)
        if after < before:  # false for NaN
            return _with_values(layer, start, trial, free), after
    return None


def _with_values(layer: SSMLayer, cut: LayerCut, trial: Trial, free: Iterable[nn.Parameter]) -> LayerCut:
    """A cut that writes what was fitted, also to parameters that it left alone; their moments stay."""
    values = {parameter: parameter.detach().cpu() for parameter in free}
    changes = [
        replace(change, value=values.pop(parameter)) if parameter in values else change
        for change, parameter in zip(cut.changes, trial.parameters, strict=True)
    ]
    additions = [
        replace(addition, value=values.pop(parameter)) if parameter in values else addition
        for addition, parameter in zip(cut.additions, trial.added, strict=True)
    ]
    present, prefix = dict(layer.module.named_parameters()), f"{layer.name}." if layer.name else ""
    for name, parameter in trial.module.named_parameters():
        if parameter in values:
            old, same = present[name], torch.arange(len(parameter))
            changes.append(ParameterChange(f"{prefix}{name}", old, values[parameter], (MomentTerm(old, same, 0),)))
    return replace(cut, changes=tuple(changes), additions=tuple(additions))


def fit(
    module: nn.Module, free: Mapping[nn.Parameter, Tensor], lessons: Sequence[Lesson], steps: int, rate: float
) -> None:
    """Fit some entries of a layer's parameters, in place.

    Args:
        module: the layer. Its other parameters do not need gradients afterwards.
        free: parameters, each with the share of a step that its entries take: 0 for those that are not fitted.
        lessons: inputs and outputs, taken in turns.
        steps: of Adam; they grow at first, and fall to 0 along a cosine.
        rate: the largest step, as a share of the root mean square of a tensor.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(parameter in free)
    squares = torch.stack([parameter.detach().square().mean() for parameter in free])
    scales = dict(zip(free, squares.sqrt().tolist(), strict=True))
    adam = torch.optim.Adam([{"params": [parameter], "lr": rate * scale} for parameter, scale in scales.items()])
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share(step, steps))
    with torch.enable_grad():
        for step in range(steps):
            lesson = lessons[step % len(lessons)]
            loss = (run(module, lesson.example) - lesson.wanted).square().sum() / lesson.wanted.square().sum()
            adam.zero_grad()
            loss.backward()
            before = {parameter: parameter.detach().clone() for parameter in free}
            adam.step()
            with torch.no_grad():
                for parameter, share in free.items():
                    parameter.copy_(before[parameter].lerp(parameter, share))
            decay.step()


def _share(step: int, steps: int) -> float:
    """The share of the largest step that a step is."""
    return min(1.0, (step + 1) / (WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _lessons(module: Any, examples: Sequence[Example]) -> tuple[list[Lesson], list[Lesson]]:
    """What is fitted, and what is held out; the same where there is but one row."""
    module = copy.deepcopy(module).eval()
    counts = [number_of_rows(example) for example in examples]
    if max(counts) == 1:
        taught, asked = list(examples[:-1] or examples), list(examples[-1:])
    else:
        held = [max(1, count // HELD_OUT) if count > 1 else 0 for count in counts]
        parts = list(zip(examples, counts, held, strict=True))
        taught = [rows_of(example, slice(count - rest)) for example, count, rest in parts]
        asked = [rows_of(example, slice(count - rest, None)) for example, count, rest in parts if rest]
    every = [Lesson(_precise(example), run(module, example)) for example in (*taught, *asked)]
    return every[: len(taught)], every[len(taught) :]


@torch.no_grad()
def _error(module: Any, lessons: Sequence[Lesson]) -> float:
    return relative_error((run(module, lesson.example), lesson.wanted) for lesson in lessons)


def _in_float32(module: Any) -> Any:
    """The layer with parameters that small steps can change; the parameters stay the same objects."""
    for parameter in module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return module


def _precise(example: Example) -> Example:
    """An example for a layer in float32."""

    def wide(value: Any) -> Any:
        is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if is_half else value

    kwargs = {name: wide(value) for name, value in example.kwargs.items()}
    return replace(example, args=tuple(map(wide, example.args)), kwargs=kwargs)
