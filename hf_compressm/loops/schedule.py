"""When cuts happen: at steps that are fixed beforehand, or once the ranking of the states is stable."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils import logging

from hf_compressm.compression import Scores, rank_stability
from hf_compressm.config import CompreSSMConfig
from hf_compressm.utils.checks import is_count, quoted


logger = logging.get_logger(__name__)

MEASUREMENTS = 20
"""Number of measurements between `start` and `end` if no `interval` is given."""


class Trigger(ABC):
    """A rule that decides at the end of each step whether a cut comes at the start of the next one.

    Attributes:
        latest: the last step after which a cut could still come.
    """

    latest: int

    def observe(self, step: int) -> dict[str, float]:
        """Observe the model after a step; returns numbers to log."""
        return {}

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether a cut comes after this step."""

    @abstractmethod
    def next_look(self, step: int) -> int | None:
        """The next step after which the model will be measured, for a cut or to see its ranking; None if none is."""

    @abstractmethod
    def describe(self) -> str:
        """When cuts come, in words."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-ready."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a trigger without state has nothing to do
        """Resume from what a checkpoint kept."""


class Scheduled(Trigger):
    """A trigger that cuts after fixed steps.

    Args:
        steps: ascending.
    """

    def __init__(self, steps: tuple[int, ...]) -> None:
        """Store the steps."""
        self.steps = steps
        self.latest = steps[-1]

    def is_due(self, step: int) -> bool:
        """Whether the step is one of them."""
        return step in self.steps

    def next_look(self, step: int) -> int | None:
        """The next of the steps."""
        return next((one for one in self.steps if one > step), None)

    def describe(self) -> str:
        """The steps."""
        return f"after steps {', '.join(map(str, self.steps))}"


class StableRanking(Trigger):
    """A trigger that cuts when the states' ranking is stable, by the rank correlation of successive measurements.

    Args:
        config: settings: `start`, `end`, `interval`, `stability`, `stability_window`, `num_cuts`.
        max_steps: optimizer steps of the run.
        measure: returns the states' present scores.

    Raises:
        ValueError: if the measurements between `start` and `end` are too few for any cut.
    """

    def __init__(self, config: CompreSSMConfig, max_steps: int, measure: Callable[[], Scores]) -> None:
        """Find the steps after which to measure."""
        start, end = span(config, max_steps)
        interval = (end - start) / MEASUREMENTS if config.interval is None else resolve("interval", config, max_steps)
        self._steps = tuple(range(max(start, 1), min(end, max_steps - 1) + 1, max(round(interval), 1)))
        if len(self._steps) <= config.stability_window:
            raise ValueError(
                f"No cut can happen: {len(self._steps)} measurement(s) between start={config.start:g} and "
                f"end={config.end:g} (of {max_steps} steps), and stability_window={config.stability_window} needs "
                f"{config.stability_window + 1}. Raise end, or lower interval or stability_window."
            )
        self.latest = self._steps[-1]
        self._config = config
        self._measure = measure
        self._scores: Scores = {}
        self._correlations: list[float] = []  # successive ones since the last cut
        self._due_after: int | None = None
        self._cuts = 0

    def observe(self, step: int) -> dict[str, float]:
        """Measure the ranking if a measurement is due."""
        if step not in self._steps or self._cuts >= self._config.num_cuts:
            return {}
        before, self._scores = self._scores, self._measure()
        correlations = rank_stability(before, self._scores)
        logged = {"compressm/rank_measured_layers": float(len(self._scores))}
        if correlations:
            mean = sum(correlations.values()) / len(correlations)
            self._correlations = [*self._correlations, mean][-self._config.stability_window :]
            logged |= {"compressm/rank_stability": mean, "compressm/rank_stability_min": min(correlations.values())}
        full = len(self._correlations) == self._config.stability_window
        if full and min(self._correlations) >= self._config.stability:
            self._due_after = step
            self._correlations = []
            self._cuts += 1
        return logged

    def is_due(self, step: int) -> bool:
        """Whether the ranking was found stable after this step."""
        return step == self._due_after

    def next_look(self, step: int) -> int | None:
        """The next measurement, unless all cuts are made."""
        if self._cuts >= self._config.num_cuts:
            return None
        return next((one for one in self._steps if one > step), None)

    def describe(self) -> str:
        """The rule, and the last correlations measured."""
        seen = ", ".join(f"{value:.3f}" for value in self._correlations) or "none"
        return (
            f"when {self._config.stability_window} successive rank correlations reach {self._config.stability:g}, "
            f"measured after steps {self._steps[0]} to {self._steps[-1]} (last ones: {seen})"
        )

    def state(self) -> dict[str, Any]:
        """Scores and correlations."""
        scores = {name: [list(group) for group in groups] for name, groups in self._scores.items()}
        return {
            "scores": scores,
            "correlations": list(self._correlations),
            "due_after": self._due_after,
            "cuts": self._cuts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume with them; a checkpoint of a run with another trigger has none.

        Raises:
            ValueError: if they are not of the form of `state`.
        """
        scores, correlations = state.get("scores", {}), state.get("correlations", [])
        due_after, cuts = state.get("due_after"), state.get("cuts", 0)
        fine = isinstance(scores, Mapping) and all(_are_scores(groups) for groups in scores.values())
        fine = fine and _are_numbers(correlations) and is_count(cuts) and (due_after is None or is_count(due_after))
        if not fine:
            raise ValueError(f"The callback's state holds a ranking that cannot be read, {quoted(state)}.")
        self._scores, self._correlations, self._due_after, self._cuts = scores, correlations, due_after, cuts


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _are_scores(groups: Any) -> bool:
    return isinstance(groups, list) and all(map(_are_numbers, groups))


def trigger_for(config: CompreSSMConfig, max_steps: int, measure: Callable[[], Scores]) -> Trigger:
    """The trigger that the settings ask for.

    Raises:
        ValueError: if no cut could happen.
    """
    if config.trigger == "stable":
        return StableRanking(config, max_steps, measure)
    return Scheduled(cut_steps(config, max_steps))


def cut_steps(config: CompreSSMConfig, max_steps: int) -> tuple[int, ...]:
    """Optimizer steps after which scheduled cuts happen, ascending; one after step k comes at the start of step k + 1.

    `num_cuts` steps evenly spaced after `start` and up to `end`, the last one at `end`; or every `interval` steps.

    Args:
        config: settings.
        max_steps: optimizer steps of the run.

    Raises:
        ValueError: if no cut could happen: unknown length, `end` not after `start`, or all steps outside the run.
    """
    start, end = span(config, max_steps)
    if config.interval is None:
        wanted = [start + (end - start) * number / config.num_cuts for number in range(1, config.num_cuts + 1)]
    else:
        interval = max(resolve("interval", config, max_steps), 1)
        wanted = list(range(start + interval, end + 1, interval))
    steps = tuple(sorted({round(step) for step in wanted if 1 <= round(step) < max_steps}))
    late = sum(round(step) >= max_steps for step in wanted)
    if late and steps:
        logger.warning(
            f"{late} of {len(wanted)} cuts fall after this run's last step ({max_steps}) and will not happen."
        )
    if not steps:
        raise ValueError(
            f"No cut can happen: with start={config.start:g}, end={config.end:g} and "
            f"{'num_cuts' if config.interval is None else 'interval'}="
            f"{config.num_cuts if config.interval is None else config.interval} none falls on steps 1 to "
            f"{max_steps - 1} of this run."
        )
    return steps


def span(config: CompreSSMConfig, max_steps: int) -> tuple[int, int]:
    """The steps `start` and `end`.

    Raises:
        ValueError: if the run's length is not known, or `end` does not come after `start`.
    """
    if max_steps <= 0:
        raise ValueError(f"The number of training steps is not known (max_steps={max_steps}); set max_steps.")
    start, end = (resolve(name, config, max_steps) for name in ("start", "end"))
    if end <= start:
        raise ValueError(
            f"No cut can happen: end={config.end:g} is step {end}, not after start={config.start:g}, step {start} "
            f"(of {max_steps}). Raise end, or train for more steps."
        )
    return start, end


def resolve(name: str, config: CompreSSMConfig, max_steps: int) -> int:
    """A setting in steps as a step number; values below 1 are a share of `max_steps`.

    Raises:
        ValueError: if it is neither a share nor a whole number.
    """
    value = getattr(config, name)
    if value < 1:
        return round(value * max_steps)
    if int(value) != value:
        raise ValueError(f"{name} must be a whole number of steps, or a share below 1; got {value}.")
    return int(value)
