"""Running a layer again, as it is and as a cut would make it, on inputs that it was given before.

What a cut does to the output of a layer is then measured, with every norm, gate and erase term in it.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_compressm.families.calls import Example, Seen, first_tensor
from hf_compressm.families.family import LayerCut, SSMLayer
from hf_compressm.families.gradients import second_order
from hf_compressm.models import own_class
from hf_compressm.utils.devices import summing_dtype, to_device


LONGEST = 2048
"""Steps of a row that are kept: what a layer does with its states shows in as many."""
KEPT_TOKENS = 16384
"""Tokens that are kept of all batches together, for every layer."""


def example_of(seen: Seen, tokens: int) -> Example | None:
    """The first rows of a call that was seen, with at most `tokens` tokens; None if there is no room for a step."""
    batch, steps = _shape(seen.args, seen.kwargs)
    if not steps or tokens < 1:
        return None
    length = min(steps, LONGEST, tokens)
    rows = max(1, tokens // length)
    args, kwargs = first_rows(seen.args, seen.kwargs, rows, length)
    device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    mask = None if seen.mask is None else seen.mask[:rows, :length]
    gradient = None if seen.gradient is None else seen.gradient[:rows, :length].clone()
    return Example(args, kwargs, mask, dtype, gradient, seen.scored / batch * (length / steps))


def room_for(examples: Sequence[Example]) -> int:
    """How many further tokens may be kept beside these."""
    return KEPT_TOKENS - sum(map(tokens_of, examples))


def tokens_of(example: Example) -> int:
    """Rows times steps."""
    batch, length = _shape(example.args, example.kwargs)
    return batch * length


def first_rows(
    args: Sequence[Any], kwargs: Mapping[str, Any], rows: int, length: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the first rows, and first steps, of all arguments that have as many as the first tensor; no cache.

    Where `cu_seqlens` or the like says how texts lie in a row, the last one ends with the row.
    """
    batch, steps = _shape(args, kwargs)

    def few(value: Any, name: str = "") -> Any:
        if isinstance(value, Cache):
            return None
        if isinstance(value, Tensor) and name.startswith("cu_seq") and length is not None and length < steps:
            return torch.cat([value[value < length], value.new_tensor([length])])
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != batch:
            return value
        value = value.detach()[:rows]
        return (value[:, :length] if value.dim() > 1 and value.shape[1] == steps else value).clone()

    return tuple(map(few, args)), {name: few(value, name) for name, value in kwargs.items()}


@dataclass(frozen=True, eq=False)
class Trial:
    """A layer as a cut makes it.

    Attributes:
        module: a copy of the layer, in evaluation mode.
        parameters: what each change of the cut has become in it.
        added: what each addition of the cut has become in it.
    """

    module: Any
    parameters: tuple[nn.Parameter, ...]
    added: tuple[nn.Parameter, ...] = ()


def with_cut(layer: SSMLayer, cut: LayerCut) -> Trial:
    """A copy of a layer as a cut makes it."""
    module = copy.deepcopy(layer.module).eval()
    parts = {id(old): new for old, new in zip(layer.module.modules(), module.modules(), strict=True)}
    if cut.additions:
        module.__class__ = own_class(type(module)) or type(module)
        vars(module).pop("forward", None)  # where somebody has replaced it: that of the class which it leaves
    owners = {
        id(parameter): (parts[id(part)], name)
        for part in layer.module.modules()
        for name, parameter in part.named_parameters(recurse=False)
    }
    written = []
    for change in cut.changes:
        old, (owner, name) = change.parameter, owners[id(change.parameter)]
        value = to_device(change.beside().to(old.dtype, copy=True), old.device)
        written.append(nn.Parameter(value))
        setattr(owner, name, written[-1])
    added = []
    for addition in cut.additions:
        value = to_device(addition.value.to(addition.beside.dtype, copy=True), addition.beside.device)
        added.append(nn.Parameter(value))
        parts[id(addition.module)].register_parameter(addition.name.rpartition(".")[2], added[-1])
    for attribute in cut.attributes:
        setattr(parts[id(attribute.module)], attribute.name, attribute.value)
    return Trial(module, tuple(written), tuple(added))


def run(module: nn.Module, example: Example) -> Tensor:
    """The output of a layer, `(batch, length, channels)`, 0 at padding."""
    device = next(module.parameters()).device.type
    with ExitStack() as stack:
        if example.autocast is not None:
            stack.enter_context(torch.autocast(device, example.autocast))
        result: Any = module(*example.args, **example.kwargs)
    result = first_tensor(result)
    result = result.float() if result.dtype != torch.float64 else result
    return result if example.mask is None else result * example.mask[..., None].to(result)


def measured_error(layer: SSMLayer, cut: LayerCut, examples: Sequence[Example]) -> float:
    """Relative error of the output of a layer after a cut, `|y - y_r| / |y|` over all examples."""
    return measured(layer, cut, examples)[0]


@torch.no_grad()
def measured(layer: SSMLayer, cut: LayerCut, examples: Sequence[Example]) -> tuple[float, float | None]:
    """What a cut does to the output of a layer, and by it to the loss.

    Returns:
        The relative error of the output, `|y - y_r| / |y|` over all examples; and the change of the loss to second
        order, where the examples know its gradient.
    """
    before, after = copy.deepcopy(layer.module).eval(), with_cut(layer, cut).module
    pairs = [(run(after, example), run(before, example)) for example in examples]
    return relative_error(pairs), _loss_change(examples, [new - old for new, old in pairs])


def _loss_change(examples: Sequence[Example], changes: Sequence[Tensor]) -> float | None:
    """What changes of a layer's output add to the mean loss; None where its gradient is unknown or not finite."""
    sums, scored = [], []
    for example, change in zip(examples, changes, strict=True):
        if example.gradient is None:
            return None
        sums.append((example.gradient * change).flatten(1).sum(dim=1))
        scored.append(torch.full(sums[-1].shape, example.scored, dtype=torch.float64))
    terms = torch.cat(sums).cpu().double() / torch.cat(scored)
    return second_order(terms, torch.cat(scored)) if bool(torch.isfinite(terms).all()) else None


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`|y - y_r| / |y|` over all pairs of `y_r` and `y`."""
    squares = []
    for given, wanted in pairs:
        dtype = summing_dtype(wanted.device)
        given, wanted = given.to(dtype), wanted.to(dtype)
        squares.append(torch.stack([(given - wanted).square().sum(), wanted.square().sum()]))
    rows = torch.stack(squares).tolist() if squares else []
    lost, total = sum(row[0] for row in rows), sum(row[1] for row in rows)
    return (lost / total) ** 0.5 if total > 0 else 0.0


def rows_of(example: Example, rows: slice) -> Example:
    """Some rows of an example."""
    batch, _ = _shape(example.args, example.kwargs)

    def some(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch else value

    kwargs = {name: some(value) for name, value in example.kwargs.items()}
    masks = {name: some(getattr(example, name)) for name in ("mask", "gradient")}
    return replace(example, args=tuple(map(some, example.args)), kwargs=kwargs, **masks)


def number_of_rows(example: Example) -> int:
    """Rows of an example."""
    return _shape(example.args, example.kwargs)[0]


def _shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and steps of the first tensor."""
    shapes = (value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1)
    return next(((shape[0], shape[1]) for shape in shapes), (0, 0))
