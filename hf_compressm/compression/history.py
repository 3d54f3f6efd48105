"""The cuts of one training run, as the run remembers them and writes them beside the weights."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_compressm.compression import CompressionPlan, CompressionResult, LayerPlan
from hf_compressm.compression.record import LONGEST_RECORD
from hf_compressm.files.atomic import read_json
from hf_compressm.files.names import HISTORY_FILE
from hf_compressm.utils.checks import is_count, is_name, is_number, is_size, quoted


SCHEMA_VERSION = 1
CALLBACK = "CompreSSMCallback"
"""The name under which a Trainer's state keeps that of the callback."""
OUTCOMES = ("cut", "unchanged", "undone", "rolled back")
LONGEST_TEXT = 10_000


@dataclass(frozen=True, eq=False)
class CutEvent:
    """One attempt to cut, at the start of step `step + 1`, or the rollback of a cut that was kept at first.

    Attributes:
        step: optimizer steps done before it.
        result: what it did, with every layer's spectrum in `result.plan`.
        outcome: `"cut"`; `"unchanged"`, nothing was worth cutting or could be cut; `"undone"`, the held-out loss rose
            too much and the model is unchanged; `"rolled back"`, the metric had not recovered and the model returned
            to a checkpoint.
        attempt: 1, or more for the gentler attempts that follow an undone one.
        reduction_share: share of the reduction that the settings ask for.
        before: the guard's held-out loss before the cut; for a rollback, the metric before the cut that it undoes.
        after: the same after the cut; for a rollback, at the end of the recovery.
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
        """State size by layer name after the attempt."""
        return self.result.state_sizes_before if self.outcome == "undone" else self.result.state_sizes_after

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict; numbers that are not finite are null."""
        own = {name: getattr(self, name) for name in ("step", "outcome", "attempt", "reduction_share")}
        own |= {name: _finite(getattr(self, name)) for name in ("before", "after")}
        result = {name: getattr(self.result, name) for name in (*_RESULT_FIELDS, *_LATER_RESULT_FIELDS)}
        return own | result | self.result.plan.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CutEvent":
        """The inverse of `to_dict`.

        Raises:
            ValueError: if the dict is not of that form.
        """
        values = _with_absent(values, {**_LATER_RESULT_FIELDS, **_PREDICTED})
        result_fields = _RESULT_FIELDS | _LATER_RESULT_FIELDS
        _check_values(values, _EVENT_FIELDS | result_fields | _PREDICTED | {"layers": _is_list_of_layers})
        plan = CompressionPlan(tuple(map(_layer, values["layers"])), values["predicted_loss_change"])
        result = CompressionResult(plan, **{name: values[name] for name in result_fields})
        return cls(result=result, **{name: values[name] for name in _EVENT_FIELDS})


def _is_optional_number(value: Any) -> bool:
    return value is None or is_number(value)


def _is_optional_count(value: Any) -> bool:
    return value is None or is_count(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_list_of_layers(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= LONGEST_RECORD


def _is_spectrum(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(is_name(name) and is_size(size) for name, size in value.items())


def _is_one_of(values: Sequence[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


_EVENT_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "outcome": _is_one_of(OUTCOMES),
    "attempt": is_size,
    "reduction_share": is_number,
    "before": _is_optional_number,
    "after": _is_optional_number,
}
_RESULT_FIELDS: dict[str, Callable[[Any], bool]] = {
    "changed": _is_switch,
    "seconds": is_number,
    "state_sizes_before": _are_sizes,
    "state_sizes_after": _are_sizes,
    "parameters_before": is_count,
    "parameters_after": is_count,
}
_LATER_RESULT_FIELDS: dict[str, Callable[[Any], bool]] = {
    "state_bytes_before": _is_optional_count,
    "state_bytes_after": _is_optional_count,
}
"""Fields that earlier records lack."""
_PREDICTED: dict[str, Callable[[Any], bool]] = {"predicted_loss_change": _is_optional_number}
"""Of a plan and of its layers; absent where it was not measured."""
_LAYER_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": is_name,
    "family": is_name,
    "state_size": is_size,
    "new_state_size": is_size,
    "hankel_singular_values": _is_spectrum,
    "energy_kept": is_number,
    "predicted_error": is_number,
    "error_bound": _is_optional_number,
    "status": _is_one_of(("cut", "kept", "skipped", "rolled back")),
    "reason": _is_text,
    "criterion": is_name,
}


def rollback_event(step: int, cut: CutEvent, before: float, after: float | None, seconds: float) -> CutEvent:
    """The event of rolling back a cut; its sizes are those of the cut, the other way round."""
    done = cut.result
    nothing: dict[str, Any] = {
        "energy_kept": 1.0,
        "predicted_error": 0.0,
        "predicted_loss_change": None,
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
        state_bytes_before=done.state_bytes_after,
        state_bytes_after=done.state_bytes_before,
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
    if not isinstance(record, Mapping) or not is_count(record.get("schema_version")):
        raise ValueError(f"The history must be an object with a schema_version, got {quoted(record)}.")
    if record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(
            f"The history has schema_version {record['schema_version']}; this package reads up to {SCHEMA_VERSION}. "
            "Upgrade hf_compressm."
        )
    events = record.get("events")
    if not isinstance(events, list) or len(events) > LONGEST_RECORD:
        raise ValueError(f"The history must hold a list of events, got {quoted(events)}.")
    return [CutEvent.from_dict(event) for event in events]


def read_history(folder: Path, trainer_state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The history of cuts that a run, a checkpoint or a saved model keeps; empty without one.

    Earlier versions kept it in the Trainer's state too, and a checkpoint that they did not seal has it only there.

    Args:
        folder: a directory that may have a `compressm_history.json`.
        trainer_state: contents of its `trainer_state.json`, if it exists.

    Raises:
        ValueError: naming the file, if it is not whole.
    """
    path = folder / HISTORY_FILE
    if path.exists():
        return read_json(path)
    found: Any = trainer_state
    for name in ("stateful_callbacks", CALLBACK, "run"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _layer(values: Any) -> LayerPlan:
    values, allowed = _with_absent(values, _PREDICTED), _LAYER_FIELDS | _PREDICTED
    _check_values(values, allowed)
    spectrum = torch.tensor(values["hankel_singular_values"], dtype=torch.float64)
    return LayerPlan(**{name: values[name] for name in allowed} | {"hankel_singular_values": spectrum})


def _with_absent(values: Any, names: Iterable[str]) -> Any:
    """The fields of a record, those that it lacks as None."""
    return {**dict.fromkeys(names), **values} if isinstance(values, Mapping) else values


def _check_values(values: Any, allowed: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raise `ValueError` unless every field exists and has an allowed value."""
    if not isinstance(values, Mapping):
        raise ValueError(f"The history holds a cut that cannot be read: {quoted(values)} is not an object.")
    for name, is_fine in allowed.items():
        if name not in values or not is_fine(values[name]):
            raise ValueError(f"The history holds a cut that cannot be read: {name} is {quoted(values.get(name))}.")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
