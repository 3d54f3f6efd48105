"""The cuts of one training run: what the callback remembers, logs, and writes beside the weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_compressm.compression import CompressionPlan, CompressionResult, LayerPlan


SCHEMA_VERSION = 1
OUTCOMES = ("cut", "unchanged", "undone", "rolled back")


@dataclass(frozen=True, eq=False)
class CutEvent:
    """One attempt to cut, at the start of step `step + 1`, or the way back from a cut that was kept at first.

    Attributes:
        step: optimizer steps done before it.
        result: what it did, with every layer's spectrum in `result.plan`.
        outcome: `"cut"`; `"unchanged"`, nothing was worth cutting or could be cut; `"undone"`, the held-out loss rose
            too much and the model is as before; `"rolled back"`, the metric had not recovered and the model returned
            to a checkpoint.
        attempt: 1, or more for the gentler attempts that follow an undone one.
        reduction_share: share of the reduction that the settings ask for.
        before: the guard's held-out loss before the cut, or before a rollback the metric from before its cut.
        after: the same after the cut, or at the end of the recovery.
    """

    step: int
    result: CompressionResult
    outcome: str = ""  # "" for what the result says, "cut" or "unchanged"
    attempt: int = 1
    reduction_share: float = 1.0
    before: float | None = None
    after: float | None = None

    def __post_init__(self) -> None:
        """Fill in the outcome of an attempt that no guard has judged."""
        if not self.outcome:
            object.__setattr__(self, "outcome", "cut" if self.result.changed else "unchanged")

    @property
    def sizes(self) -> dict[str, int]:
        """State size by layer name once it was over."""
        return self.result.state_sizes_before if self.outcome == "undone" else self.result.state_sizes_after

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict; numbers that are not finite are null."""
        own = {name: getattr(self, name) for name in ("step", "outcome", "attempt", "reduction_share")}
        own |= {name: _finite(getattr(self, name)) for name in ("before", "after")}
        result = {name: getattr(self.result, name) for name in _RESULT_FIELDS}
        return own | result | self.result.plan.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CutEvent":
        """The inverse of `to_dict`.

        Raises:
            ValueError: if the dict is not of that form.
        """
        try:
            layers = tuple(_layer(layer) for layer in values["layers"])
            if not isinstance(values["step"], int) or values["outcome"] not in OUTCOMES or not layers:
                raise ValueError(f"step {values['step']!r:.80}, outcome {values['outcome']!r:.80}")
            result = CompressionResult(CompressionPlan(layers), **{name: values[name] for name in _RESULT_FIELDS})
            own = ("step", "outcome", "attempt", "reduction_share", "before", "after")
            return cls(result=result, **{name: values[name] for name in own})
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"The history holds a cut that cannot be read ({type(error).__name__}: {error})."
            ) from error


_RESULT_FIELDS = (
    "changed",
    "seconds",
    "state_sizes_before",
    "state_sizes_after",
    "parameters_before",
    "parameters_after",
)


def rollback_event(step: int, cut: CutEvent, before: float, after: float | None, seconds: float) -> CutEvent:
    """The event of going back from a cut, whose sizes are those of the cut the other way round."""
    done = cut.result
    nothing: dict[str, Any] = {
        "energy_kept": 1.0,
        "predicted_error": 0.0,
        "error_bound": None,
        "status": "rolled back",
    }
    layers = tuple(
        replace(
            layer,
            state_size=layer.new_state_size,
            new_state_size=layer.state_size,
            hankel_singular_values=layer.hankel_singular_values[:0],
            reason=f"the metric had not recovered from the cut after step {cut.step}",
            **nothing,
        )
        for layer in done.plan.layers
    )
    result = CompressionResult(
        plan=CompressionPlan(layers),
        changed=True,
        seconds=seconds,
        state_sizes_before=done.state_sizes_after,
        state_sizes_after=done.state_sizes_before,
        parameters_before=done.parameters_after,
        parameters_after=done.parameters_before,
    )
    return CutEvent(step, result, "rolled back", cut.attempt, cut.reduction_share, before, after)


def to_record(events: Sequence[CutEvent]) -> dict[str, Any]:
    """JSON-ready history of a run."""
    return {"schema_version": SCHEMA_VERSION, "events": [event.to_dict() for event in events]}


def from_record(record: Any) -> list[CutEvent]:
    """The inverse of `to_record`.

    Raises:
        ValueError: if the record is of a newer version, or not of that form.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("schema_version"), int):
        raise ValueError(f"The history must be an object with a schema_version, got {record!r:.80}.")
    if record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(
            f"The history has schema_version {record['schema_version']}; this package reads up to {SCHEMA_VERSION}. "
            "Upgrade hf_compressm."
        )
    events = record.get("events")
    if not isinstance(events, list):
        raise ValueError(f"The history must hold a list of events, got {events!r:.80}.")
    return [CutEvent.from_dict(event) for event in events]


def scalars(event: CutEvent) -> dict[str, float]:
    """Flat numbers of one event for a Trainer's log; layers are numbered in model order."""
    result = event.result
    layers = result.plan.layers
    values: dict[str, float] = {
        "compressm/cut": float(event.outcome == "cut"),
        "compressm/state_size_mean": sum(event.sizes.values()) / len(layers),
        "compressm/energy_kept": min(layer.energy_kept for layer in layers),
        "compressm/predicted_error": max(layer.predicted_error for layer in layers),
        "compressm/skipped_layers": float(sum(layer.status == "skipped" for layer in layers)),
        "compressm/parameters": float(
            result.parameters_before if event.outcome == "undone" else result.parameters_after
        ),
        "compressm/seconds": result.seconds,
        "compressm/attempt": float(event.attempt),
        "compressm/undone": float(event.outcome == "undone"),
        "compressm/rolled_back": float(event.outcome == "rolled back"),
    }
    bounds = [layer.error_bound for layer in layers if layer.error_bound is not None]
    if bounds:
        values["compressm/error_bound"] = max(bounds)
    for name in ("before", "after"):
        if getattr(event, name) is not None:
            values[f"compressm/guard_{name}"] = float(getattr(event, name))
    for number, size in enumerate(event.sizes.values()):
        values[f"compressm/layer_{number:02d}/state_size"] = float(size)
    return values


def _layer(values: Mapping[str, Any]) -> LayerPlan:
    values = dict(values)
    spectrum = torch.tensor(values.pop("hankel_singular_values"), dtype=torch.float64)
    for name, kind in (("name", str), ("family", str), ("state_size", int), ("new_state_size", int), ("status", str)):
        if not isinstance(values.get(name), kind):
            raise ValueError(f"{name} {values.get(name)!r:.80}")
    return LayerPlan(hankel_singular_values=spectrum.reshape(-1), **values)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
