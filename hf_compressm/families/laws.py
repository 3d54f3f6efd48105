"""The laws that a declared layout is held to, tried on a copy of a layer.

| law | what it says |
|---|---|
| parts | every name is there, and every axis is as long as its segments |
| recurrence | the layer calls recurrences with the groups and states of the layout, before its output projection |
| rows | what is declared as B, C or states of a group makes that of the recurrence, and nothing else |
| folding | C is a linear map of the rows that are said to fold |
| order | exchanging states changes nothing |
| smaller | with fewer states the layer runs, and gives what it gave with the others unread; not where norms or an \
erase term see all states |
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.calls import DELTA, GLA, SELECTIVE, Call, Seen, unrepeated
from hf_compressm.families.family import (
    SSMLayer,
)
from hf_compressm.families.layout import REST, STATE, B, C, Layout, Slot
from hf_compressm.families.selective import SelectiveFamily
from hf_compressm.families.sums import Statistics
from hf_compressm.families.watching import watching


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative to the largest entry; sums in another order."""
LOUDER = 2.0
STATES_MAKE = {SELECTIVE: "A", DELTA: "g", GLA: "g"}
"""What the entries of states make of a call, by its kind."""
_COMPARED = ("u", "x", "delta", "dt", "g", "A", "B", "C", "initial_states")


class LayoutError(ValueError):
    """A layout that breaks one of the laws."""

    def __init__(self, layer: str, law: str, reason: str) -> None:
        super().__init__(f"The layout declared for {layer} breaks the law of {law}: {reason}.")


@dataclass(frozen=True, eq=False)
class Trial:
    """A layer and what to call it with.

    Attributes:
        family: the family with the layout.
        layer: the layer; only copies of it are run.
        args: positional arguments.
        kwargs: others.
    """

    family: SelectiveFamily
    layer: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.family.layout

    def broken(self, law: str, reason: str) -> LayoutError:
        """The error that names a law."""
        return LayoutError(type(self.layer).__name__, law, reason)

    def copied(self) -> Any:
        """A copy of the layer, in evaluation mode."""
        return copy.deepcopy(self.layer).eval()

    def run(self, layer: Any) -> tuple[Tensor, Sequence[Call]]:
        """The output of a copy, in the precision that its recurrences leave of it, and its calls of recurrences."""
        recorded = _Recorded()
        found = SSMLayer("", layer, self.family, 0)
        with watching(layer, [(found, recorded)]), torch.no_grad(), torch.random.fork_rng():
            result = layer(*self.args, **self.kwargs)
        while not isinstance(result, Tensor):
            result = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
        dtypes = [result.dtype, *(call.output.dtype for call in recorded.calls)]
        if any(call.kind in (DELTA, GLA) for call in recorded.calls):  # which transformers and fla compute in float32
            dtypes.append(torch.float32)
        calls = [unrepeated(call, self.layout.groups_of(layer)) for call in recorded.calls]
        return result.detach().to(min(dtypes, key=lambda dtype: dtype.itemsize)), calls


class _Recorded(Statistics):
    """Keeps the calls of a layer."""

    calls: Sequence[Call] = ()

    def update(self, seen: Seen) -> None:
        self.calls = seen.calls


def check_laws(family: SelectiveFamily, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Hold a layer to the laws of its layout; it does not change.

    Args:
        family: with the layout.
        layer: an example of the layer.
        args: positional arguments that it can be called with, a small batch.
        kwargs: further ones.

    Raises:
        LayoutError: naming the first law that is broken.
    """
    trial = _precise(Trial(family, layer, args, kwargs))
    _attributes(trial)
    output, calls = _recurrence(trial)
    _parts(trial)
    _rows(trial, calls)
    _order(trial, output)
    if not family.reruns:
        _smaller(trial)


def _precise(trial: Trial) -> Trial:
    """The trial in float64, on the CPU; as it is where only a GPU can run it."""

    def wide(value: Any) -> Any:
        return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value

    layer = trial.copied().double()
    precise = Trial(trial.family, layer, tuple(map(wide, trial.args)), {k: wide(v) for k, v in trial.kwargs.items()})
    with suppress(Exception):  # kernels take no float64
        precise.run(precise.copied())
        return precise
    return trial


def _attributes(trial: Trial) -> None:
    layer, layout = trial.layer, trial.layout
    try:
        layout.size_of(layer)
    except ValueError as error:
        raise trial.broken("parts", str(error).rstrip(".")) from error
    output: Any = trial.family.output_of(layer)
    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise trial.broken("parts", f"its output {layout.output!r} is no projection with a weight (out, channels)")


def _parts(trial: Trial) -> None:
    layer, layout = trial.layer, trial.layout
    try:
        slots = list(layout.slots(layer))
    except ValueError as error:
        raise trial.broken("parts", str(error).rstrip(".")) from error
    for slot in slots:
        reason = _misfit(layout, layer, slot)
        if reason:
            raise trial.broken("parts", f"{slot.name} has shape {tuple(slot.tensor.shape)}, and {reason}")


def _misfit(layout: Layout, layer: Any, slot: Slot) -> str:
    """Why the axis of a tensor cannot be what the layout says, or ""."""
    part, groups = slot.part, layout.groups_of(layer)
    if part.segments.count(REST) > 1:
        return f"two rests of unknown width in {part.segments}; give the width of one"
    if (part.by_group or part.interleaved) and slot.tensor.shape[0] % groups:
        return f"axis 0 does not divide into {groups} groups"
    length = layout.block(layer, slot)
    known = layout.known_width(layer, part)
    rest = length - known
    if rest < 0 or (rest and REST not in part.segments):
        return f"its axis {slot.axis} holds {length}, where the segments {part.segments} take {known}"
    return ""


def _recurrence(trial: Trial) -> tuple[Tensor, Sequence[Call]]:
    layer, layout = trial.copied(), trial.layout
    output, calls = trial.run(layer)
    size, groups = layout.size_of(layer), layout.groups_of(layer) * layout.readers_of(layer)
    if not calls:
        raise trial.broken(
            "recurrence",
            "its forward calls no known recurrence (selective_scan_fn, mamba_chunk_scan_combined, or selective_scan "
            "and ssd_scan of hf_compressm.scans)",
        )
    if any(call.gain is None for call in calls):
        raise trial.broken("recurrence", f"{layout.output} does not run on what its recurrence gave")
    for call in calls:
        if _states(call) != size:
            raise trial.broken("recurrence", f"it has {_states(call)} states, and {layout.state_size} is {size}")
    found = sum(_groups(call) for call in calls)
    if found % groups:
        raise trial.broken("recurrence", f"its calls have {found} group(s), which {groups} cannot share")
    return output, calls


def _rows(trial: Trial, calls: Sequence[Call]) -> None:
    """Each kind of segment of each group makes that of the recurrence, and nothing else."""
    groups = trial.layout.groups_of(trial.layer)
    for kind in (B, C, STATE):
        if not any(kind in part.segments for part in trial.layout.parts):
            continue
        for group in range(groups):
            louder = trial.copied()
            _multiply(trial.layout, louder, kind, group, torch.arange(trial.layout.size_of(louder)), LOUDER)
            _, changed = trial.run(louder)
            _compare(trial, calls, changed, kind, group)


def _compare(trial: Trial, before: Sequence[Call], after: Sequence[Call], kind: str, group: int) -> None:
    """What has changed in the arguments of all calls, where the rows of one kind and group were multiplied."""
    groups, readers, number = trial.layout.groups_of(trial.layer), trial.layout.readers_of(trial.layer), 0
    rows = {STATE: "states", B: "rows of B", C: "rows of C"}[kind]
    for call, (one, other) in enumerate(zip(before, after, strict=True), start=1):
        names = [name for name in _COMPARED if name in one.arguments]
        meant = STATES_MAKE.get(one.kind, "initial_states") if kind == STATE else kind
        for own in range(_groups(one)):
            pairs = {name: (_of_group(one, name, own), _of_group(other, name, own)) for name in names}
            place = number // readers % groups
            wanted = meant if place == group else ""
            changed = {name for name, pair in pairs.items() if not _close(*pair)}
            others = sorted(changed - {wanted})
            if others:
                text = f"the {rows} of group {group} change the {others[0]} of call {call}, group {place}"
                raise trial.broken("rows", text)
            if wanted and not changed and (wanted not in pairs or float(pairs[wanted][0].abs().max()) > 0):
                text = f"the {rows} of group {group} do not change the {wanted} of call {call}, group {place}"
                raise trial.broken("rows", text)
            if wanted and kind == C and trial.layout.folds and not _close(LOUDER * pairs[C][0], pairs[C][1]):
                raise trial.broken("folding", "twice the rows of C do not make twice the C of the recurrence")
            number += 1


def _order(trial: Trial, output: Tensor) -> None:
    """Exchange states in all parts."""
    exchanged = trial.copied()
    _cut(trial.layout, exchanged, trial.family.exchanged(exchanged))
    if not _close(output, trial.run(exchanged)[0]):
        hint = _hint(trial.layout, trial.layer)
        raise trial.broken("order", f"its output is another one when all its states are exchanged{hint}")


def _smaller(trial: Trial) -> None:
    """Leave one state out."""
    layout = trial.layout
    size, groups = layout.size_of(trial.layer), layout.groups_of(trial.layer)
    step = trial.family.granularity(trial.layer)
    if size <= step:
        return
    kept = trial.family.first(trial.layer, size - step)
    silent, smaller = trial.copied(), trial.copied()
    for group in range(groups):
        dropped = torch.ones(size, dtype=torch.bool).index_fill(0, kept[group], False)
        _multiply(layout, silent, C, group, dropped.nonzero().flatten(), 0.0)
    _cut(layout, smaller, kept)
    hint = _hint(layout, trial.layer)
    try:
        output, calls = trial.run(smaller)
    except Exception as error:  # anybody's forward may raise anything
        text = f"it does not run with {size - step} states: {type(error).__name__}: {error}{hint}"
        raise trial.broken("smaller", text) from error
    found = [_states(call) for call in calls]
    if set(found) != {size - step}:
        raise trial.broken("smaller", f"with {size - step} states its recurrences have {found}{hint}")
    expected, unread = trial.run(silent)
    is_silent = all(float(call.arguments["C"].detach().abs().amin()) == 0 for call in unread)
    is_scaled = trial.family.normalizes and _is_scaled(unread, calls, kept)
    if is_silent and not is_scaled and not _close(expected, output):
        raise trial.broken("smaller", f"with {size - step} states it gives something else{hint}")


def _hint(layout: Layout, layer: Any) -> str:
    """The parameters and buffers of the state's width that the layout does not name, in words."""
    known, size = layout.state_axes(layer), layout.size_of(layer)
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    found = [name for name, tensor in tensors if name not in known and size in tensor.shape]
    return f"; {', '.join(found)} may have a state axis too" if found else ""


def _cut(layout: Layout, layer: Any, kept: Tensor) -> None:
    """Keep states of a copy, `(groups, r)`, and leave the others out."""
    R = torch.eye(layout.size_of(layer), dtype=torch.float64)[kept].mT
    changes = layout.changes(layer, "", kept, R)
    attributes = layout.attributes(layer, kept.shape[1], kept)
    for change in changes:
        owner, _, name = change.name.rpartition(".")
        value = change.value.to(change.parameter)
        layer.get_submodule(owner)._parameters[name] = nn.Parameter(value)
    for attribute in attributes:
        setattr(attribute.module, attribute.name, attribute.value)


@torch.no_grad()
def _multiply(layout: Layout, layer: Any, kind: str, group: int, states: Tensor, factor: float) -> None:
    """Multiply what makes some states of one group, in all tensors of a copy."""
    for slot in layout.slots(layer):
        index = layout.places(layer, slot, kind, group)
        if index is None:
            continue
        tensor = slot.tensor.data
        if slot.part.by_group:
            tensor = tensor.chunk(layout.groups_of(layer))[group]
        place: list[Any] = [slice(None)] * tensor.dim()
        place[slot.axis] = index[:, states].flatten()
        tensor[tuple(place)] *= factor


def _states(call: Call) -> int:
    given = call.arguments
    return int(given["A"].shape[1] if call.kind == SELECTIVE else given["B"].shape[-1])


def _groups(call: Call) -> int:
    vectors = call.arguments["B"]
    if call.kind == SELECTIVE:
        return int(vectors.shape[1]) if vectors.dim() == 4 else 1
    return int(vectors.shape[2])


def _of_group(call: Call, name: str, group: int) -> Tensor:
    """The part of an argument that belongs to a group."""
    value, groups = call.arguments[name].detach(), _groups(call)
    if name in ("B", "C"):
        axis = 1 if call.kind == SELECTIVE else 2
        return value if value.dim() == 3 else value.select(axis, group)
    axis = {"A": 0, "u": 1, "delta": 1, "initial_states": 1}.get(name, 2)
    return value.chunk(groups, dim=axis)[group]


def _is_scaled(before: Sequence[Call], after: Sequence[Call], kept: Tensor) -> bool:
    """Whether the kept states' B is what it was but for a factor at each step: a norm has fewer entries."""
    number, is_scaled = 0, False
    for one, other in zip(before, after, strict=True):
        for group in range(_groups(one)):
            axis = 1 if one.kind == SELECTIVE else -1
            full, smaller = _of_group(one, "B", group), _of_group(other, "B", group)
            full = full.index_select(axis, kept[number % len(kept)])
            energy = smaller.square().sum(axis, keepdim=True).clamp_min(torch.finfo(smaller.dtype).tiny)
            factor = (full * smaller).sum(axis, keepdim=True) / energy
            is_scaled = is_scaled or (not _close(full, smaller) and _close(full, factor * smaller))
            number += 1
    return is_scaled


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = TOLERANCES.get(one.dtype, 1e-2) * float(one.abs().max())
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance
