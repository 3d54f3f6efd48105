"""The layout of a layer: which axes of which of its parameters hold states, and what follows when there are fewer.

| word | meaning |
|---|---|
| N | states of a channel, the layer's state size |
| group | channels that share B and C, and so keep the same states; one call of a recurrence has one or several |
| segment | a stretch of an axis: states, the rows that make B, those that make C, or a rest without states |

The groups of a layer are counted through its calls of recurrences: two directions with one group each are groups 0
and 1.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.changes import AttributeChange, MomentTerm, ParameterChange
from hf_compressm.families.maps import apply_map
from hf_compressm.utils.devices import to_device


STATE, B, C, REST = "state", "B", "C", "*"
Width = int | str | Callable[[Any], int]
"""A number, the name of an attribute of the layer, or a function of the layer."""


@dataclass(frozen=True)
class Following:
    """A stretch of an axis without states, whose entries follow the states that are kept.

    Attributes:
        width: how many entries there are in a layer, with so many states.
        kept: which ones of them stay in a layer that keeps the states `(r,)`.
    """

    width: Callable[[Any, int], int]
    kept: Callable[[Any, Tensor], Tensor]


Segment = Width | Following


@dataclass(frozen=True)
class Part:
    """A parameter, or a module with weight and bias, that has a state axis.

    Attributes:
        name: dotted name in the layer.
        axis: the axis of the parameter; a bias has only one.
        segments: what lies along the axis: `"state"`, `"B"`, `"C"`, `"*"` for a rest (the only one of unknown width),
            or the width of a rest. Several groups lie side by side in each of the first three. A `Following` stands
            for entries that follow the states.
        group: the only group whose states these are. None for all groups if the layout says how many there are, else
            for group 0.
        by_group: whether axis 0 has one equal block for each group instead.
        interleaved: whether the axis has one equal block for each group, each with all segments.
        folds: whether the recurrence's C is a linear map of the rows `"C"`, so that these may be mixed.
        copies: how often a group's states lie there, side by side in each segment; all copies keep the same ones.
    """

    name: str
    axis: int
    segments: tuple[Segment, ...]
    group: int | None = None
    by_group: bool = False
    folds: bool = False
    copies: Width = 1
    interleaved: bool = False


def states(name: str, axis: int = -1, *, group: int | None = None, by_group: bool = False) -> Part:
    """A parameter with one entry per state along an axis, such as `A_log`; see [`Part`]."""
    return Part(name, axis, (STATE,), group, by_group)


def rows(name: str, *segments: Width, folds: bool = False, group: int | None = None, by_group: bool = False) -> Part:
    """A projection, or a convolution, whose rows make B and C, such as `x_proj`; see [`Part`].

    Args:
        name: dotted name in the layer, of a module or of a parameter.
        segments: what the rows make, from the first to the last: `rows("x_proj", "*", "B", "C")`.
        folds: whether nothing but linear maps lies between these rows and the recurrence's C.
        group: the only group whose B and C they make; None as in [`Part`].
        by_group: whether axis 0 has one block for each group, and the rows are on axis 1.
    """
    return Part(name, 1 if by_group else 0, segments, group, by_group, folds)


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a part."""

    part: Part
    name: str  # in the layer
    owner: nn.Module
    own: str  # in its owner
    tensor: Tensor
    axis: int  # not negative


@dataclass(frozen=True)
class Layout:
    """What a layer's tensors and attributes say about its state.

    Attributes:
        state_size: the attribute with N.
        parts: all that has a state axis.
        output: the projection after the recurrence, at whose input the loudness of every channel is measured.
        groups: how many groups there are; by default as many as `parts` tell apart.
        mask: the argument of the layer's forward that is 1 at real tokens and 0 at padding, `(batch, length)`.
        follows: attributes that depend on N, each with a function of layer and new size.
        unfused: attributes, with the values that make the layer call its recurrence by itself.
        others: names of all tensors without a state axis. If there are any, a tensor that is neither here nor in
            `parts` and is as wide as the state is refused.
        readers: how many neighbouring groups of a call stand for one group here: heads with the same states, each
            with a C of its own.
    """

    state_size: str
    parts: tuple[Part, ...]
    output: str = "out_proj"
    groups: Width | None = None
    mask: str = "attention_mask"
    follows: Mapping[str, Callable[[Any, int], int | float]] = field(default_factory=dict)
    unfused: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    readers: Width = 1

    @property
    def folds(self) -> bool:
        """Whether a linear map of C can be folded into the layer's parameters."""
        return all(part.folds for part in self.parts if C in part.segments)

    def size_of(self, module: Any) -> int:
        """N.

        Raises:
            ValueError: if the attribute holds no number of states.
        """
        size = getattr(module, self.state_size, None)
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{type(module).__name__}.{self.state_size} is {size!r}; the state_size of its layout must name an "
                "attribute with the number of states."
            )
        return size

    def groups_of(self, module: Any) -> int:
        """The number of groups."""
        if self.groups is not None:
            return _width(module, self.groups, 0)
        return 1 + max((part.group or 0 for part in self.parts), default=0)

    def readers_of(self, module: Any) -> int:
        """The number of groups of a call that stand for one group."""
        return _width(module, self.readers, 0)

    def slots(self, module: Any) -> Iterator[Slot]:
        """The tensors of the parts, as they are in a layer.

        Raises:
            ValueError: naming a part that the layer does not have.
        """
        for part in self.parts:
            owner, name = _resolve(module, part.name)
            held = getattr(owner, name, None)
            if held is None:
                raise ValueError(f"{type(module).__name__} has no {part.name!r}, which its layout names.")
            if isinstance(held, nn.Module):
                tensors = {own: getattr(held, own, None) for own in ("weight", "bias")}
                found = [(f"{part.name}.{own}", held, own, tensor) for own, tensor in tensors.items()]
            else:
                found = [(part.name, owner, name, held)]
            for full, holder, own, tensor in found:
                if not isinstance(tensor, Tensor):
                    continue
                yield Slot(part, full, holder, own, tensor, 0 if own == "bias" else part.axis % tensor.dim())

    def known_width(self, module: Any, part: Part) -> int:
        """The length of all segments of known width, along an axis that is not divided into groups."""
        size = self.size_of(module)
        known = sum(_width(module, one, size) for one in part.segments if one not in (STATE, B, C, REST))
        return known + self._stretches(module, part) * size

    def rest_width(self, module: Any, slot: Slot) -> int:
        """The width of the rest of unknown width, 0 without one."""
        if REST not in slot.part.segments:
            return 0
        return self.block(module, slot) - self.known_width(module, slot.part)

    def places(self, module: Any, slot: Slot, kind: str, group: int) -> Tensor | None:
        """Where along its axis a tensor holds the states of one kind and group, `(copies, N)`; None if it does not.

        With one block of axis 0 for each group, where it does in the group's block.
        """
        part, size = slot.part, self.size_of(module)
        if kind not in part.segments or group not in self._groups_in(module, part):
            return None
        before = part.segments[: part.segments.index(kind)]
        start = sum(self._segment_width(module, slot, segment) for segment in before)
        copies = _width(module, part.copies, size)
        start += group * copies * size if self._beside(module, part) > copies else 0
        start += group * self.block(module, slot) if part.interleaved else 0
        return start + torch.arange(copies * size).view(copies, size)

    def fitted(self, module: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters of the parts, each with 1 at the entries of states, B and C, and 0 at the rests."""
        for slot in self.slots(module):
            if not isinstance(slot.tensor, nn.Parameter):
                continue
            mask = torch.zeros_like(slot.tensor)
            for group, kind in product(range(self.groups_of(module)), (STATE, B, C)):
                places = self.places(module, slot, kind, group)
                if places is None:
                    continue
                block = mask[group] if slot.part.by_group else mask
                axis = slot.axis - 1 if slot.part.by_group else slot.axis
                block.index_fill_(axis, to_device(places.flatten(), mask.device), 1)
            yield slot.tensor, mask

    def length(self, module: Any, slot: Slot, size: int) -> int:
        """How long the axis of a tensor would be with `size` states."""
        present, stretches = self.size_of(module), self._stretches(module, slot.part)
        following = [segment for segment in slot.part.segments if isinstance(segment, Following)]
        others = sum(one.width(module, size) - one.width(module, present) for one in following)
        blocks = self.groups_of(module) if slot.part.interleaved else 1
        return int(slot.tensor.shape[slot.axis]) + blocks * (stretches * (size - present) + others)

    def maps(self, module: Any, slot: Slot, kept: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """What a cut does along the axis of a tensor, and the map of its gradient.

        Args:
            module: the layer.
            slot: one of its tensors.
            kept: `(groups, r)`, ascending.
            R: `(groups, N, r)`; C becomes `R^T C` where it can.
        """
        part = slot.part
        groups = self._groups_in(module, part)
        if part.by_group:
            pairs = [self._maps(module, slot, [group], kept, R) for group in groups]
            return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
        if part.interleaved:
            block = self.block(module, slot)
            pairs = [self._maps(module, slot, [group], kept, R) for group in groups]
            if part.folds:
                return torch.block_diag(*(pair[0] for pair in pairs)), torch.block_diag(*(pair[1] for pair in pairs))
            forward = torch.cat([pair[0] + group * block for group, pair in zip(groups, pairs, strict=True)])
            return forward, forward
        return self._maps(module, slot, groups, kept, R)

    def changes(self, module: Any, prefix: str, kept: Tensor, R: Tensor) -> tuple[ParameterChange, ...]:
        """The parameters of a layer that keeps `kept` and reads out `R^T C`; as for `maps`.

        The gradient of a read-out that is kept stays the same; that of an input includes what the dropped states
        passed on, `R^T g`.
        """
        found = []
        for slot in self.slots(module):
            if isinstance(slot.tensor, nn.Parameter):
                forward, adjoint = self.maps(module, slot, kept, R)
                moments = (MomentTerm(slot.tensor, adjoint, slot.axis),)
                name = f"{prefix}{slot.name}"
                found.append(ParameterChange.mapped(name, slot.tensor, forward, slot.axis, moments))
        return tuple(found)

    def attributes(self, module: Any, size: int, kept: Tensor) -> tuple[AttributeChange, ...]:
        """The attributes and buffers that follow a cut to `size` states, which keeps `kept` `(groups, size)`."""
        found = [AttributeChange(module, self.state_size, size)]
        R = torch.zeros(*kept.shape, 0)
        for slot in self.slots(module):
            if not isinstance(slot.tensor, nn.Parameter):
                selected = apply_map(slot.tensor, self.maps(module, slot, kept, R)[0], slot.axis)
                found.append(AttributeChange(slot.owner, slot.own, selected))
            elif slot.own == "weight" and slot.axis == 0:
                present, length = slot.tensor.shape[0], self.length(module, slot, size)
                found += [AttributeChange(slot.owner, name, length) for name in _channels(slot.owner, present)]
        follows = {name: rule(module, size) for name, rule in self.follows.items() if hasattr(module, name)}
        return (*found, *(AttributeChange(module, name, value) for name, value in follows.items()))

    def shapes(self, module: Any, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes with `size` states, by name, of the parameters that have a state axis."""
        found = {}
        for slot in self.slots(module):
            if isinstance(slot.tensor, nn.Parameter):
                shape = list(slot.tensor.shape)
                shape[slot.axis] = self.length(module, slot, size)
                found[slot.name] = tuple(shape)
        return found

    def state_axes(self, module: Any) -> dict[str, int | None]:
        """The axis of every tensor that the layout knows, None for those without one."""
        return dict.fromkeys(self.others) | {slot.name: slot.axis for slot in self.slots(module)}

    def block(self, module: Any, slot: Slot) -> int:
        """The length of one block of an axis, that of a group where groups are interleaved."""
        return int(slot.tensor.shape[slot.axis]) // (self.groups_of(module) if slot.part.interleaved else 1)

    def _beside(self, module: Any, part: Part) -> int:
        """How many stretches of states lie side by side in a segment: the copies of all groups in it."""
        copies = _width(module, part.copies, self.size_of(module))
        return copies * (1 if part.by_group or part.interleaved else len(self._groups_in(module, part)))

    def _groups_in(self, module: Any, part: Part) -> list[int]:
        """The groups whose states a part holds."""
        if part.group is not None or (self.groups is None and not part.by_group):
            return [part.group or 0]
        return list(range(self.groups_of(module)))

    def _stretches(self, module: Any, part: Part) -> int:
        """How many stretches of N entries an axis has."""
        return sum(one in (STATE, B, C) for one in part.segments) * self._beside(module, part)

    def _segment_width(self, module: Any, slot: Slot, segment: Segment) -> int:
        """The width of one segment, with all the groups in it."""
        if segment == REST:
            return self.rest_width(module, slot)
        if segment in (STATE, B, C):
            return self._beside(module, slot.part) * self.size_of(module)
        return _width(module, segment, self.size_of(module))

    def _maps(self, module: Any, slot: Slot, groups: list[int], kept: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """`maps` of one block of axis 0."""
        size, part = self.size_of(module), slot.part
        forward: list[Tensor] = []
        adjoint: list[Tensor] = []
        start = 0
        for segment in part.segments:
            if segment in (STATE, B, C):
                copies = range(_width(module, part.copies, size))
                blocks: list[tuple[int, Tensor, Tensor | None]] = [
                    (size, kept[group], R[group]) for group in groups for _ in copies
                ]
            else:
                width = self._segment_width(module, slot, segment)
                stay = segment.kept(module, kept[0]) if isinstance(segment, Following) else torch.arange(width)
                blocks = [(width, stay, None)]
            for old, indices, mixed in blocks:
                if part.folds:
                    selected = torch.eye(old, dtype=torch.float64)[indices]
                    read = selected if mixed is None or segment == STATE else mixed.mT
                    forward.append(read if segment == C else selected)
                    adjoint.append(read if segment == B else selected)
                else:
                    forward.append(start + indices)
                    start += old
        if part.folds:
            return torch.block_diag(*forward), torch.block_diag(*adjoint)
        return torch.cat(forward), torch.cat(forward)


def _resolve(module: Any, name: str) -> tuple[Any, str]:
    """The owner of a dotted name, and the last part of it."""
    *path, own = name.split(".")
    for part in path:
        module = getattr(module, part, None)
    return module, own


def _width(module: Any, width: Segment, size: int) -> int:
    """The width of a stretch without states, in a layer of `size` states."""
    if isinstance(width, Following):
        return width.width(module, size)
    if isinstance(width, str):
        return int(getattr(module, width))
    return int(width(module)) if callable(width) else int(width)


def _channels(owner: Any, present: int) -> Iterator[str]:
    """The attributes of a projection or convolution that count its rows."""
    names: tuple[str, ...] = ("out_features", "out_channels")
    if getattr(owner, "groups", 1) == present:  # one row for each channel of the input
        names = ("in_channels", "out_channels", "groups")
    yield from (name for name in names if getattr(owner, name, None) == present)
