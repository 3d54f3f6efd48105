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


LONGEST = 2048
"""Steps of a row that are kept: what a layer does with its states shows in as many."""
KEPT_TOKENS = 16384
"""Tokens that are kept of all batches together, for every layer."""
KEPT_BYTES = 2**26
"""More tokens are kept of narrow layers, up to so many bytes of inputs."""


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
    kept = sum(map(tokens_of, examples))
    held = sum(_bytes(example) for example in examples)
    return max(KEPT_TOKENS - kept, (KEPT_BYTES - held) * kept // held if held else 0)


def _bytes(example: Example) -> int:
    values = (*example.args, *example.kwargs.values(), example.gradient)
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


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
        written.append(nn.Parameter(change.value.to(old.device, old.dtype, copy=True)))
        setattr(owner, name, written[-1])
    added = []
    for addition in cut.additions:
        value = addition.value.to(addition.beside.device, addition.beside.dtype, copy=True)
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
    terms = [_first_order(example, new - old) for example, (new, old) in zip(examples, pairs, strict=True)]
    known = [(term, example.scored) for term, example in zip(terms, examples, strict=True) if term is not None]
    if len(known) < len(terms):
        return relative_error(pairs), None
    scored = [torch.full_like(term, count) for term, count in known]
    return relative_error(pairs), second_order(torch.cat([term for term, _ in known]), torch.cat(scored))


def _first_order(example: Example, change: Tensor) -> Tensor | None:
    """What a change of the output adds to the mean loss of every row, `(rows,)`; None where that is not known."""
    if example.gradient is None:
        return None
    term = (example.gradient * change).flatten(1).sum(dim=1).double().cpu() / example.scored
    return term if bool(torch.isfinite(term).all()) else None


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`|y - y_r| / |y|` over all pairs of `y_r` and `y`."""
    lost = total = 0.0
    for given, wanted in pairs:
        lost += float((given.double() - wanted.double()).square().sum())
        total += float(wanted.double().square().sum())
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
