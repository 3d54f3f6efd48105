"""What a cut would do (the plan) and what it did (the result)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from hf_compressm.families import LayerCut, SSMLayer


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer of a plan.

    Attributes:
        name: dotted name in the model.
        family: name of the layer's family.
        state_size: present number of states.
        new_state_size: number of states after the cut.
        hankel_singular_values: float64, descending; two per state where the real map of a complex system is balanced.
        energy_kept: share of the sum of the HSVs that stays.
        predicted_error: relative output error, an estimate; exact under white input for LTI layers.
        error_bound: upper bound of the H-infinity error for LTI layers cut in closed form, else None.
        status: `"cut"`, `"kept"` (nothing worth cutting) or `"skipped"` (cannot be cut).
        reason: why, in words.
        criterion: how the states were ranked.
        state_bytes: bytes of one sequence's state now, and after the cut; None in records that lack them.
        predicted_loss_change: what the cut of this layer by itself is expected to add to the loss; None where no loss
            was looked at.
    """

    name: str
    family: str
    state_size: int
    new_state_size: int
    hankel_singular_values: Tensor
    energy_kept: float
    predicted_error: float
    error_bound: float | None
    status: str
    reason: str
    criterion: str
    state_bytes: tuple[int, int] | None = None
    predicted_loss_change: float | None = None
    layer: SSMLayer | None = field(default=None, repr=False)
    cut: LayerCut | None = field(default=None, repr=False)
    fingerprints: tuple[int, ...] | None = field(default=None, repr=False)

    def unchanged(self, **values: Any) -> "LayerPlan":
        """The plan of a layer that stays as large as it is, with other values."""
        present = None if self.state_bytes is None else (self.state_bytes[0], self.state_bytes[0])
        return replace(self, new_state_size=self.state_size, state_bytes=present, **values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict, spectrum included; a spectrum that could not be measured is empty."""
        names = ("name", "family", "state_size", "new_state_size", "energy_kept", "predicted_error", "error_bound")
        values = {name: getattr(self, name) for name in (*names, "status", "reason", "criterion")}
        spectrum = [value for value in self.hankel_singular_values.tolist() if math.isfinite(value)]
        if self.predicted_loss_change is not None:
            values["predicted_loss_change"] = self.predicted_loss_change
        return values | {"hankel_singular_values": spectrum}


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """What a cut would do to a model, computed without changing it; `str()` gives a table.

    Attributes:
        layers: one entry per SSM layer that was considered.
        predicted_loss_change: what all cuts together add to the mean loss of the calibration batches, by running the
            model with the cut layers; None where no loss was looked at.
    """

    layers: tuple[LayerPlan, ...]
    predicted_loss_change: float | None = None

    @property
    def changes(self) -> bool:
        """Whether any layer would shrink."""
        return any(layer.status == "cut" for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict."""
        values: dict[str, Any] = {"layers": [layer.to_dict() for layer in self.layers]}
        if self.predicted_loss_change is not None:
            values["predicted_loss_change"] = self.predicted_loss_change
        return values

    def without_tensors(self) -> "CompressionPlan":
        """The same plan without the parameters it was made from, so that they can be freed."""
        layers = tuple(replace(layer, layer=None, cut=None, fingerprints=None) for layer in self.layers)
        return CompressionPlan(layers, self.predicted_loss_change)

    def skipped(self, reason: str) -> "CompressionPlan":
        """The same plan with no layer cut; those that would have been are skipped for `reason`."""
        nothing: dict[str, Any] = {"energy_kept": 1.0, "predicted_error": 0.0, "error_bound": None}
        nothing |= {"predicted_loss_change": None}
        nothing |= {"status": "skipped", "reason": reason, "layer": None, "cut": None, "fingerprints": None}
        return CompressionPlan(
            tuple(layer.unchanged(**nothing) if layer.status == "cut" else layer for layer in self.layers)
        )

    def __str__(self) -> str:
        """One row per layer, and what the state of a sequence takes."""
        head = ("layer", "family", "states", "energy kept", "predicted error", "bound", "status")
        rows = [head, *(_row(layer) for layer in self.layers)]
        return "\n".join([_table(rows), *_state_bytes(self.layers), *_loss_change(self.predicted_loss_change)])


@dataclass(frozen=True, eq=False)
class CompressionResult:
    """What a cut did.

    Attributes:
        plan: the plan that was applied, without its tensors.
        changed: whether any layer shrank.
        seconds: wall-clock seconds spent, planning and calibration included where `compress` did both.
        state_sizes_before: state size by layer name.
        state_sizes_after: likewise.
        parameters_before: number of parameters of the model.
        parameters_after: likewise.
        state_bytes_before: bytes of one sequence's state, all layers together; None in records that lack them.
        state_bytes_after: likewise.
        note: what the caller has to do now, or "".
    """

    plan: CompressionPlan
    changed: bool
    seconds: float
    state_sizes_before: dict[str, int]
    state_sizes_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    state_bytes_before: int | None = None
    state_bytes_after: int | None = None
    note: str = ""

    def __str__(self) -> str:
        """The plan's table, and what the caller has to do now."""
        return "\n".join(part for part in (str(self.plan), self.note) if part)


def _state_bytes(layers: Sequence[LayerPlan]) -> Iterator[str]:
    """What the state of one sequence takes in all layers, in words."""
    known = [layer.state_bytes for layer in layers if layer.state_bytes is not None]
    if known and len(known) == len(layers):
        before, after = (sum(sizes) for sizes in zip(*known, strict=True))
        yield f"state of a sequence: {before:,} -> {after:,} bytes"


def _loss_change(predicted: float | None) -> Iterator[str]:
    """What the cut is expected to add to the loss, in words."""
    if predicted is not None:
        yield f"loss: {predicted:+.4f} expected"


def _row(layer: LayerPlan) -> tuple[str, ...]:
    bound = "" if layer.error_bound is None else f"{layer.error_bound:.3g}"
    status = layer.status if not layer.reason else f"{layer.status}: {layer.reason}"
    sizes = f"{layer.state_size} -> {layer.new_state_size}"
    numbers = (f"{layer.energy_kept:.4f}", f"{layer.predicted_error:.4f}", bound)
    return (layer.name, layer.family, sizes, *numbers, status)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
