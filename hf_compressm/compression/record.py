"""The record of cuts that travels in `model.config.compressm`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hf_compressm.compression.plan import CompressionPlan
from hf_compressm.utils.checks import is_count, is_name, is_number, is_plain_text, is_size, quoted


SCHEMA_VERSION = 1
LONGEST_RECORD = 10_000
"""Most cuts of a record, and most layers of a cut; a record with more was not written here."""
_ENTRIES = ("schema_version", "method", "state_sizes_before", "state_sizes_after", "cuts")
_ENTRIES_OF_A_CUT = ("step", "state_sizes", "criterion", "predicted_error", "predicted_loss_change")
_SIZES = ("state_sizes_before", "state_sizes_after")


def record_cut(config: Any, plan: CompressionPlan, step: int | None = None) -> None:
    """Append one cut to the config's `compressm` record.

    The record is a small JSON object: `schema_version`, `method`, `state_sizes_before` (before the first cut),
    `state_sizes_after` (now) and `cuts`, one entry each with its step, sizes, criteria and predicted errors, and with
    the predicted change of the loss where it was measured.

    Args:
        config: a transformers config; its other fields stay.
        plan: the plan that is being applied.
        step: optimizer step after which it happened, None outside training.

    Raises:
        ValueError: if the config has a record that this version cannot read.
    """
    check_record(getattr(config, "compressm", None))
    sizes = {layer.name: layer.new_state_size for layer in plan.layers}
    record = copy.deepcopy(getattr(config, "compressm", None)) or {
        "schema_version": SCHEMA_VERSION,
        "method": "CompreSSM (arXiv:2510.02823)",
        "state_sizes_before": {},
        "state_sizes_after": {},
        "cuts": [],
    }
    before = {layer.name: layer.state_size for layer in plan.layers}
    record["state_sizes_before"] = before | record["state_sizes_before"]
    record["state_sizes_after"] |= sizes
    cut: dict[str, Any] = {
        "step": step,
        "state_sizes": sizes,
        "criterion": {layer.name: layer.criterion for layer in plan.layers},
        "predicted_error": {layer.name: layer.predicted_error for layer in plan.layers},
    }
    if plan.predicted_loss_change is not None:
        cut["predicted_loss_change"] = plan.predicted_loss_change
    record["cuts"].append(cut)
    config.compressm = record


def recorded_cuts(config: Any) -> list[dict[str, Any]]:
    """The cuts in a config's record, oldest first; empty without a record.

    Raises:
        ValueError: if this version cannot read the record.
    """
    record = getattr(config, "compressm", None)
    check_record(record)
    return list((record or {}).get("cuts", []))


def check_record(record: Any) -> None:
    """Make sure that a record, which may come from a stranger, has the expected form and nothing else in it.

    Raises:
        ValueError: naming the entry and the value.
    """
    if record is None:
        return
    _demand(isinstance(record, Mapping), "config.compressm", record, "an object")
    version = record.get("schema_version")
    _demand(is_count(version), "config.compressm.schema_version", version, "a whole number")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"config.compressm has schema_version {version}; this package reads up to {SCHEMA_VERSION}. "
            "Upgrade hf_compressm."
        )
    _check_entries("config.compressm", record, _ENTRIES)
    _demand(is_plain_text(record.get("method")), "config.compressm.method", record.get("method"), "a plain text")
    for name in _SIZES:
        check_table(f"config.compressm.{name}", record.get(name), is_size, "state sizes of at least 1")
    cuts = record.get("cuts")
    _demand(isinstance(cuts, list) and len(cuts) <= LONGEST_RECORD, "config.compressm.cuts", cuts, "a list of cuts")
    for number, cut in enumerate(cuts):
        place = f"config.compressm.cuts[{number}]"
        _demand(isinstance(cut, Mapping), place, cut, "an object")
        _check_entries(place, cut, _ENTRIES_OF_A_CUT)
        step = cut.get("step")
        _demand(step is None or is_count(step), f"{place}.step", step, "a step, or null")
        check_table(f"{place}.state_sizes", cut.get("state_sizes"), is_size, "state sizes of at least 1")
        check_table(f"{place}.criterion", cut.get("criterion"), is_name, "names")
        check_table(f"{place}.predicted_error", cut.get("predicted_error"), is_number, "numbers")
        change = cut.get("predicted_loss_change", 0.0)
        _demand(is_number(change), f"{place}.predicted_loss_change", change, "a number")


def _check_entries(place: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise `ValueError` for an entry that this version does not write: it would be copied, saved and shown."""
    unknown = [name for name in values if name not in known]
    _demand(not unknown, place, unknown[:1], f"limited to the entries {', '.join(known)}")


def check_table(place: str, table: Any, is_fine: Any, kind: str) -> None:
    """Raise `ValueError` unless a table maps layer names to values that `is_fine` accepts."""
    fine = isinstance(table, Mapping) and len(table) <= LONGEST_RECORD
    fine = fine and all(is_name(name) and is_fine(value) for name, value in table.items())
    _demand(fine, place, table, f"an object of layer names and {kind}")


def _demand(fine: bool, place: str, value: Any, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{place} must be {wanted}, got {quoted(value)}. Remove the record, or restore the file.")
