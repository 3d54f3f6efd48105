"""Results of `compare_mamba2.py` as Markdown tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delta_tables import seeds
from state_arms import ARMS
from tables import grouped, mean, spread


Result = Mapping[str, Any]
GOALS = (
    ("refit", "GHOST"),
    ("refit", "energy"),
    ("refit", "Taylor"),
    ("refit", "projection"),
    ("selection", "energy"),
)
"""Arms whose added losses are divided by another's."""
SMALL = 0.1
"""Cuts that add less to the loss than this are those whose predicted change is checked."""
CLOSE = 2.0
"""The factor within which a predicted change is right."""


@dataclass(frozen=True)
class Prediction:
    """The change of the loss by one cut.

    Attributes:
        arm: its name.
        predicted: before the cut, on calibration data.
        measured: on held-out data.
    """

    arm: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else math.nan

    @property
    def is_close(self) -> bool:
        """Whether the predicted change is within a factor of the measured one, and neither is a fall."""
        return self.measured > 0 and 1 / CLOSE <= self.ratio <= CLOSE


def tables(results: Sequence[Result]) -> str:
    """All tables."""
    found, places = [], {arm.name: place for place, arm in enumerate(ARMS, start=1)}
    results = sorted(results, key=lambda result: places.get(result["arm"], 0))
    for task, members in grouped(results, lambda result: result["task"]).items():
        found.append(f"### {task}, {members[0]['steps']} steps")
        parts = (added_table(members), ratios_table(members), further_table(members), errors_table(members))
        found += [part for part in (*parts, predictions_text(members)) if part]
    return "\n\n".join(found)


def added_losses(results: Sequence[Result]) -> dict[tuple[str, int, int], float]:
    """What a cut has added to the loss right after it, by arm, size and seed."""
    before = {result["seed"]: result["before"]["loss"] for result in results if "before" in result}
    cut = [result for result in results if "after" in result and result["seed"] in before]
    return {(one["arm"], one["size"], one["seed"]): one["after"]["loss"] - before[one["seed"]] for one in cut}


def added_table(results: Sequence[Result]) -> str:
    """Added losses right after the cut, accuracies of recall, and the mean seconds of a cut."""
    cut = [result for result in results if "after" in result]
    sizes = sorted({result["size"] for result in cut}, reverse=True)
    added = added_losses(results)
    lines = [f"| arm | seeds | {' | '.join(f'to {size}' for size in sizes)} | s |", "|---" * (len(sizes) + 3) + "|"]
    for uncut in grouped([one for one in results if "before" in one], lambda one: one["arm"]).values():
        loss = f"loss {spread([one['before']['loss'] for one in uncut], '.4f')}{_accuracy(uncut, 'before')}"
        lines.append(f"| uncut | {seeds(uncut)} | {' | '.join([loss, *[''] * len(sizes)])} |")
    for arm, members in grouped(cut, lambda one: one["arm"]).items():
        cells = []
        for size in sizes:
            same = [one for one in members if one["size"] == size]
            figures = [added[key] for one in same if (key := (arm, size, one["seed"])) in added]
            added_loss = spread(figures, "+.4f").replace("± +", "± ") if figures else ""
            cells.append(added_loss + (_accuracy(same, "after") if figures else ""))
        seconds = mean([one["seconds of the cut"] for one in members])
        lines.append(f"| {arm} | {seeds(members)} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines) if cut else ""


def _accuracy(results: Sequence[Result], when: str) -> str:
    """In brackets, of recall alone: of text it says little."""
    if not results or results[0]["task"] != "recall":
        return ""
    return f" ({spread([one[when]['accuracy'] for one in results], '.3f')})"


def ratios_table(results: Sequence[Result]) -> str:
    """Added loss of one arm over that of another, seed by seed; "" where none has both."""
    added = added_losses(results)
    sizes = sorted({size for _, size, _ in added}, reverse=True)
    lines = [f"| added loss of / of | {' | '.join(f'to {size}' for size in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for one, other in GOALS:
        cells = []
        for size in sizes:
            numbers = sorted(seed for arm, of, seed in added if (arm, of) == (one, size))
            pairs = [(added[one, size, seed], added.get((other, size, seed))) for seed in numbers]
            cells.append(", ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs if theirs))
        if any(cells):
            lines.append(f"| {one} / {other} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def further_table(results: Sequence[Result]) -> str:
    """Losses after further steps at equal wall-clock; "" without any."""
    further = [result for result in results if "trained on" in result]
    if not further:
        return ""
    marks = list(further[0]["trained on"])
    heads = [f"after the time of {mark} steps" for mark in marks]
    lines = [f"| arm | states | seeds | steps of the cut | {' | '.join(heads)} |", "|---" * (len(heads) + 4) + "|"]
    for (arm, size), members in grouped(further, lambda one: (one["arm"], one["size"])).items():
        taken = ", ".join(str(one["steps of the cut"]) for one in sorted(members, key=lambda one: one["seed"]))
        cells = []
        for mark in marks:
            same = [{**one, "then": one["trained on"][mark]} for one in members]
            cells.append(f"{spread([one['then']['loss'] for one in same], '.4f')}{_accuracy(same, 'then')}")
        lines.append(f"| {arm} | {size} | {seeds(members)} | {taken} | {' | '.join(cells)} |")
    return "\n".join(lines)


def errors_table(results: Sequence[Result]) -> str:
    """Relative errors of the layers' outputs, and the predicted over the measured ones; "" without any."""
    cut = [result for result in results if "measured" in result]
    heads = ("arm", "states", "seeds", "measured error of the layers, mean", "predicted / measured, least to largest")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (arm, size), members in grouped(cut, lambda one: (one["arm"], one["size"])).items():
        pairs = [pair for one in members for pair in zip(one["predicted"], one["measured"], strict=True)]
        ratios = [predicted / measured for predicted, measured in pairs if measured]
        cells = [f"{mean([measured for _, measured in pairs]):.3f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        lines.append(f"| {arm} | {size} | {seeds(members)} | {' | '.join(cells)} |")
    return "\n".join(lines) if cut else ""


def predictions(results: Sequence[Result]) -> list[Prediction]:
    """All cuts whose change of the loss was predicted."""
    return [point for same in grouped(results, lambda one: one["task"]).values() for point in _predictions(same)]


def _predictions(results: Sequence[Result]) -> Iterator[Prediction]:
    added = added_losses(results)
    for one in results:
        measured = added.get((one["arm"], one["size"], one["seed"]))
        if one.get("predicted loss change") is not None and measured is not None:
            yield Prediction(one["arm"], one["predicted loss change"], measured)


def predictions_text(results: Sequence[Result]) -> str:
    """In how many cuts the predicted change of the loss is about right, by arm; "" where none was predicted."""
    small = [point for point in _predictions(results) if point.measured < SMALL]
    lines = [
        f"Predicted change of the loss within a factor of {CLOSE:g} of the measured one, where that is below {SMALL}:"
    ]
    lines += [
        f"- {arm}: {sum(point.is_close for point in points)} of {len(points)} cuts, predicted / measured "
        + ", ".join(f"{point.ratio:.2f}" for point in points)
        for arm, points in grouped(small, lambda point: point.arm).items()
    ]
    return "\n".join([lines[0], "", *lines[1:]]) if small else ""
