"""What a report and a model card say about a run, as tables of plain text; each page escapes them in its own way."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from hf_compressm.compression import LayerPlan
from hf_compressm.config import RANK_RULES, CompreSSMConfig
from hf_compressm.reports.traces import Run
from hf_compressm.utils.checks import quoted


UNKNOWN = "n/a"
EXPECTED = "expected change of the loss"
MOST_METRICS = 4
MOST_LAYERS = 200
"""Most rows that a page shows; the history has all of them."""
Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows below a head.

    Attributes:
        head: headings of the columns.
        rows: each as long as the head.
        note: below the table; may be empty.
    """

    head: Row
    rows: tuple[Row, ...]
    note: str = ""


def headline(run: Run) -> str:
    """One sentence: the model, its sizes before and after, and the number of cuts."""
    before, after = _sizes(run)
    undone = 2 * sum(event.outcome == "rolled back" for event in run.cuts)  # a cut and its rollback
    cuts = (len(run.cuts) - undone) or len(run.record.get("cuts", []))
    many = f"{cuts} cut{'' if cuts == 1 else 's'}"
    best = "" if run.model_step is None else f" It is the best model of the run, that of step {run.model_step}."
    if not before:
        return f"{run.model_class}: no layer was cut.{best}"
    sizes = f"{_range(before.values())} states per layer became {_range(after.values())}"
    return f"{run.model_class}: {sizes} in {many}.{best}"


def summary(run: Run) -> Table:
    """The model before its first cut and at the end."""
    before, after = _sizes(run)
    rows: list[Row] = [("states per layer", _range(before.values()), _range(after.values()))]
    if run.cuts:
        first, last = run.cuts[0].result, run.cuts[-1].result
        rows.append(("parameters", f"{first.parameters_before:,}", f"{last.parameters_after:,}"))
        if first.state_bytes_before is not None and last.state_bytes_after is not None:
            sizes = (f"{value:,}" for value in (first.state_bytes_before, last.state_bytes_after))
            rows.append(("bytes of state per sequence", *sizes))
        for name in run.metrics()[:MOST_METRICS]:
            points = (run.before(run.cuts[0], name), run.series(f"eval_{name}")[-1])
            rows.append((f"validation {name}, with training in between", *map(_point, points)))
        rows.append(("training steps per second", *(_number(pace) for pace in run.paces())))
    return Table(("", "before the first cut", "at the end"), tuple(rows), _summary_note(run))


def cuts(run: Run) -> Table:
    """One row for each attempt to cut; without a history, one for each cut that the model's configuration records."""
    if not run.events:
        return _recorded_cuts(run)
    metric = next(iter(run.metrics()), None)
    head = ["after step", "outcome", "states per layer", "energy kept", "predicted error"]
    is_predicted = any(event.result.plan.predicted_loss_change is not None for event in run.events)
    head += [EXPECTED] if is_predicted else []
    head += [f"validation {metric} before", "after"] if metric else []
    rows = []
    for event in run.events:
        result, layers = event.result, event.result.plan.layers
        sizes = f"{_range(result.state_sizes_before.values())} → {_range(result.state_sizes_after.values())}"
        kept, error = min(layer.energy_kept for layer in layers), max(layer.predicted_error for layer in layers)
        numbers = [f"{kept:.4f}", f"{error:.4f}"]
        numbers += [_change(result.plan.predicted_loss_change)] if is_predicted else []
        evaluated = (run.before(event, metric), run.after(event, metric)) if metric else ()
        numbers += [_point(point, event.step) for point in evaluated]
        rows.append((str(event.step), event.outcome, sizes, *numbers, f"{result.seconds:.2f}"))
    note = "Energy kept is that of the layer that lost most; the predicted error is that of the worst layer."
    return Table((*head, "seconds"), tuple(rows), note)


def _recorded_cuts(run: Run) -> Table:
    """The cuts in the record that is saved with a model."""
    recorded = run.record.get("cuts", [])
    is_predicted = any("predicted_loss_change" in cut for cut in recorded)
    rows = [
        (
            UNKNOWN if cut.get("step") is None else str(cut["step"]),
            _range(cut["state_sizes"].values()),
            ", ".join(sorted(set(cut["criterion"].values()))),
            f"{max(cut['predicted_error'].values(), default=0.0):.4f}",
            *([_change(cut.get("predicted_loss_change"))] if is_predicted else ()),
        )
        for cut in recorded
    ]
    head = ("after step", "states per layer", "criterion", "largest predicted error")
    return Table((*head, EXPECTED) if is_predicted else head, tuple(rows))


def layers(run: Run) -> Table:
    """One row per layer: its first and its last size, and its part in the last attempt."""
    before, after = _sizes(run)
    last = {layer.name: layer for event in run.events for layer in event.result.plan.layers}
    rows = []
    for name in list(before)[:MOST_LAYERS]:
        layer = last.get(name)
        sizes = (name, str(before[name]), str(after.get(name, before[name])))
        rows.append((*sizes, *((layer.family, layer.criterion, _bound(layer), layer.reason) if layer else 4 * ("",))))
    note = f"The first {MOST_LAYERS} of {len(before)} layers." if len(before) > MOST_LAYERS else ""
    head = (
        "layer",
        "states before",
        "states now",
        "family",
        "criterion",
        "error bound of the last cut",
        "remark on the last attempt",
    )
    return Table(head, tuple(rows), note)


def settings(run: Run) -> Table:
    """The callback's settings that are not the defaults, and how sizes were decided."""
    defaults = CompreSSMConfig().to_dict() | dict.fromkeys(RANK_RULES)
    chosen = {name: value for name, value in run.settings.items() if value != defaults[name]}
    return Table(("setting", "value"), tuple((name, quoted(value)) for name, value in chosen.items()))


def _sizes(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """State size by layer before the first cut and now; empty where none was cut."""
    if run.cuts:
        before: dict[str, int] = {}
        after: dict[str, int] = {}
        for event in run.cuts:
            before = event.result.state_sizes_before | before
            after |= event.result.state_sizes_after
        return before, after
    record = run.record
    return dict(record.get("state_sizes_before", {})), dict(record.get("state_sizes_after", {}))


def _range(sizes: Iterable[int]) -> str:
    """One size, or the smallest and the largest."""
    found = sorted(sizes)
    if not found:
        return UNKNOWN
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]} (mean {statistics.mean(found):.1f})"


def _point(point: tuple[int, float] | None, step: int | None = None) -> str:
    """A value, and its step unless that is `step`."""
    if point is None:
        return UNKNOWN
    return f"{point[1]:.4f}" if point[0] == step else f"{point[1]:.4f} (step {point[0]})"


def _change(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:+.4f}"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _bound(layer: LayerPlan) -> str:
    return "none" if layer.error_bound is None else f"{layer.error_bound:.3g}"


def _summary_note(run: Run) -> str:
    """How the numbers of the summary were measured."""
    if not run.cuts:
        return ""
    seconds = sum(event.result.seconds for event in run.events)
    note = f"All attempts together took {seconds:.2f} s of the run."
    if run.paces()[0] is not None:
        note += " Steps per second are the median of the log's lines, without evaluations, saves and cuts."
    if run.machine:
        note += f" Measured with {run.machine}."
    return note
