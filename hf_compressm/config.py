"""Every setting of a compression; its default is defined here alone."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import FrozenInstanceError, InitVar, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_compressm.utils.checks import quoted
from hf_compressm.utils.text import decoded


RANK_RULES = ("tolerance", "max_error", "fraction", "target_state_size", "budget")
DEFAULT_TOLERANCE = 0.1

_CHOICES = {
    "criterion": ("auto", "hankel", "empirical", "fisher", "surrogate", "interpolative"),
    "keep": ("largest", "smallest", "random"),
    "realization": ("real", "complex"),
    "compat": ("stock", "best"),
    "trigger": ("schedule", "stable"),
    "optimizer_state": ("carry", "reset"),
    "on_nonfinite": ("skip", "raise"),
}

_OPTIONAL_NUMBERS = (*RANK_RULES, "interval", "max_loss_increase", "recovery_steps", "metric_tolerance")
_NUMBERS = (*_OPTIONAL_NUMBERS, "min_reduction", "start", "end", "stability")
_WHOLE_NUMBERS = {
    "target_state_size": 1,
    "round_to": 1,
    "min_state_size": 1,
    "num_cuts": 1,
    "stability_window": 1,
    "max_retries": 0,
    "calibration_batches": 1,
    "sampling_seed": 0,
    "rewarmup_steps": 0,
    "refit_steps": 0,
}
"""Smallest allowed value of each."""

SERVING_SIZES = (64, 96, 128, 256)
"""What `sizes="serving"` stands for: the state sizes that the strictest engines take, see `docs/serving.md`."""

_SWITCHES = ("allow_optimizer_reset", "save_around_cuts", "sequential")
_PATTERNS = ("layers", "ignore_layers")
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""Numbers such as `1e-2`, which YAML 1.1 reads as text: it asks for a point and for a sign of the exponent."""


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class CompreSSMConfig:
    """Settings: how much is cut, how states are ranked, and when cuts happen.

    Exactly one of `tolerance`, `max_error`, `fraction`, `target_state_size` and `budget` decides the sizes. Steps are
    optimizer steps: a whole number, or below 1 a share of the run's steps. `HfArgumentParser` reads this class, also
    together with `TrainingArguments`, which keeps its own `--seed`; in Python `seed=` is short for `sampling_seed=`.

    Settings are checked together, so none can be changed by itself later: `dataclasses.replace(config, num_cuts=2)`
    makes new ones, and `dataclasses.replace(config, tolerance=None, fraction=0.5)` new ones with another rule.

    Raises:
        ValueError: naming the setting, the value and what is allowed.
    """

    tolerance: float | None = _setting(
        None,
        f"Share of the energy (plain sum of Hankel singular values) each cut may discard. Default "
        f"{DEFAULT_TOLERANCE}.",
    )
    max_error: float | None = _setting(
        None, "Relative output error a cut may add: a guarantee for S5/LRU in closed form, a prediction otherwise."
    )
    fraction: float | None = _setting(None, "Share of the present states that each cut removes.")
    target_state_size: int | None = _setting(None, "State size to reach at the first cut.")
    budget: float | None = _setting(
        None,
        "Share of the present bytes of state that all layers together may keep, each as much as costs least: by the "
        "predicted change of the loss under criterion=fisher, otherwise by the relative error of each layer's output.",
    )
    criterion: str = _setting("auto", f"How states are ranked: {', '.join(_CHOICES['criterion'])}.")
    keep: str = _setting("largest", "Which states stay: largest; for ablations also smallest or random.")
    realization: str = _setting("real", "Balance the real system that S5/LRU compute, or the complex one (paper).")
    per_layer: bool | None = _setting(
        None,
        "Whether each layer has its own size (default for S5/LRU and under compat=best), or all share the largest.",
    )
    compat: str = _setting(
        "stock",
        "stock: plain transformers can load the result. best: models with Mamba, Mamba-2 or linear attention may move "
        "into a class of this package, saved as custom code, for sizes per layer and less damage.",
    )
    round_to: int = _setting(1, "New sizes are multiples of this.")
    sizes: str | None | list[int] = _setting(  # noqa: RUF036  HfArgumentParser reads text if str comes first, None second
        None,
        "Allowed new sizes: whole numbers with commas, or serving for "
        f"{','.join(map(str, SERVING_SIZES))}. A layer gets the smallest that is at least what the rule wants, and "
        "stays as it is if none is below its present size.",
    )
    min_state_size: int = _setting(1, "No layer gets smaller than this.")
    min_reduction: float = _setting(
        0.05, "tolerance and max_error cut a layer only if at least this share of its states goes."
    )
    layers: list[str] | None = _setting(None, "Cut only layers whose name ends with or matches one of these patterns.")
    ignore_layers: list[str] | None = _setting(None, "Leave alone the layers that match one of these patterns.")
    start: float = _setting(0, "Cuts come after this step.")
    end: float = _setting(0.1, "The last cut comes at this step.")
    num_cuts: int = _setting(4, "Number of cuts, evenly spaced after start and up to end.")
    interval: float | None = _setting(
        None,
        "Steps between cuts, instead of num_cuts; under trigger=stable, steps between measurements (default: a "
        "twentieth of the steps from start to end).",
    )
    trigger: str = _setting(
        "schedule",
        "What starts a cut: the schedule, or between start and end a stable ranking of the states.",
    )
    stability: float = _setting(0.95, "Rank correlation of successive measurements from which a ranking is stable.")
    stability_window: int = _setting(3, "Number of successive correlations that must reach stability.")
    calibration_batches: int = _setting(4, "Training batches on which selective layers are measured before each cut.")
    sequential: bool = _setting(
        False,
        "Measure each layer on what the cut layers before it give; runs the calibration once more for every layer.",
    )
    refit_steps: int | None = _setting(
        None,
        "Steps in which a cut selective layer is fitted to what it gave before, above all the rows that make its "
        "inputs and read-outs; 0 for none. Default: 100 for delta nets, and for Mamba-2 "
        "outside of training; none for others.",
    )
    sampling_seed: int = _setting(0, "Seed of the calibration sample and of keep='random'.")
    max_loss_increase: float | None = _setting(
        None,
        "Undo a cut that raises the loss on held-out batches by more than this, and try again with half the "
        "reduction.",
    )
    max_retries: int = _setting(2, "Number of gentler attempts after a cut that max_loss_increase undid.")
    recovery_steps: float | None = _setting(
        None,
        "Steps after a cut until the Trainer's metric (metric_for_best_model, by default eval_loss) is compared with "
        "its value from before the cut.",
    )
    metric_tolerance: float | None = _setting(
        None,
        "If the metric is then worse by more than this, weights and optimizer return to the checkpoint from before "
        "the cut, and the next cut takes half.",
    )
    save_around_cuts: bool = _setting(False, "Save one checkpoint before and one after each cut.")
    rewarmup_steps: int = _setting(0, "After a cut, the learning rate rises again linearly over this many steps.")
    optimizer_state: str = _setting("carry", "Carry optimizer moments over a cut, or reset those of cut parameters.")
    allow_optimizer_reset: bool = _setting(
        False, "If the optimizer state of a checkpoint is missing or does not fit, resume without it."
    )
    on_nonfinite: str = _setting("skip", "Skip a layer with NaN or Inf, or raise an error.")
    seed: InitVar[int | None] = None

    def __post_init__(self, seed: int | None) -> None:
        """Check every value; fill in the default rank rule."""
        if seed is not None:
            self._put("sampling_seed", seed)
        for item in fields(self):
            self._put(item.name, _plain(getattr(self, item.name)))
        given = [name for name in RANK_RULES if getattr(self, name) is not None]
        if len(given) > 1:
            values = ", ".join(f"{name}={quoted(getattr(self, name))}" for name in given)
            raise ValueError(f"Exactly one of {', '.join(RANK_RULES)} decides the sizes; got {values}.")
        if not given:
            self._put("tolerance", DEFAULT_TOLERANCE)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {quoted(value)}.")
            self._put(name, choices[choices.index(value)])  # plain text, where a member of an enumeration was given
        self._check_kinds()
        self._check_numbers()
        self._check_sizes()
        if (self.recovery_steps is None) != (self.metric_tolerance is None):
            raise ValueError(
                "recovery_steps and metric_tolerance go together, the steps until the metric is compared and how much "
                f"worse it may be; got recovery_steps={self.recovery_steps}, metric_tolerance={self.metric_tolerance}."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field for the first time, and refuse to change one.

        Not by `dataclass(frozen=True)`, whose error names no way out and which forbids subclasses that are not frozen.
        """
        if name in vars(self):
            rule = f"{self.rank_rule}=None, " if name in RANK_RULES and name != self.rank_rule else ""
            raise FrozenInstanceError(
                f"{name} cannot be changed, since settings are checked together and may be in use. Make new ones: "
                f"dataclasses.replace(config, {rule}{name}={quoted(value)})."
            )
        if name not in (known := sorted(item.name for item in fields(self))):
            raise FrozenInstanceError(f"There is no setting {quoted(name)}; known are {known}.")
        self._put(name, value)

    def __delattr__(self, name: str) -> None:
        """Refuse to remove a field."""
        raise FrozenInstanceError(f"{name} cannot be removed from settings.")

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def rank_rule(self) -> str:
        """Name of the one rank rule that is set."""
        return next(name for name in RANK_RULES if getattr(self, name) is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all settings, as JSON and YAML hold them."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in (*_PATTERNS, "sizes") if values[name] is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CompreSSMConfig":
        """Build from a mapping.

        Raises:
            ValueError: for an unknown setting, or a value that a setting cannot have.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"Settings must be a mapping, got {quoted(values)}.")
        known = {item.name for item in fields(cls)} | {"seed"}
        unknown = sorted(quoted(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"Unknown setting(s) {', '.join(unknown[:9])}; known are {sorted(known)}.")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "CompreSSMConfig":
        """Read a `.json`, `.yaml` or `.yml` file; an empty one gives the defaults.

        Raises:
            OSError: from the file system.
            ValueError: naming the file, if it is not JSON or YAML, or if `from_dict` refuses its values.
        """
        path = Path(path)
        text = decoded(path.read_bytes(), path)
        try:
            values = yaml.safe_load(text) if path.suffix != ".json" else json.loads(text) if text.strip() else None
        except Exception as error:  # PyYAML passes on any error of its constructors
            kind = "JSON" if path.suffix == ".json" else "YAML"
            raise ValueError(f"{path} is not {kind}: {type(error).__name__}: {error}") from error
        if values is None:  # empty, or comments alone: every setting has its default
            values = {}
        if not isinstance(values, Mapping):
            raise ValueError(f"{path} holds {type(values).__name__}, not a mapping of settings.")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_file(self, path: str | Path) -> None:
        """Write a `.json`, `.yaml` or `.yml` file."""
        path = Path(path)
        values = self.to_dict()
        text = json.dumps(values, indent=2) if path.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
        path.write_text(text, encoding="utf-8", newline="\n")

    def _check_numbers(self) -> None:
        for name in (*_WHOLE_NUMBERS, *_NUMBERS):
            value = getattr(self, name)
            if isinstance(value, str) and _EXPONENT.fullmatch(value):
                self._put(name, float(value))
        _check_range("tolerance", self.tolerance, 0, 1, "the share of energy a cut may discard")
        _check_range("fraction", self.fraction, 0, 1, "the share of states each cut removes", open_low=True)
        _check_range("budget", self.budget, 0, 1, "the share of the bytes of state that stays", open_low=True)
        _check_range("max_error", self.max_error, 0, float("inf"), "a relative output error")
        _check_range("min_reduction", self.min_reduction, 0, 1, "a share of the states")
        _check_range("start", self.start, 0, float("inf"), "steps, or a share of them below 1")
        _check_range("end", self.end, 0, float("inf"), "steps, or a share of them below 1", open_low=True)
        _check_range("interval", self.interval, 0, float("inf"), "steps, or a share of them below 1", open_low=True)
        _check_range("stability", self.stability, -1, 1, "a rank correlation")
        _check_range("max_loss_increase", self.max_loss_increase, 0, float("inf"), "a difference of losses")
        _check_range("metric_tolerance", self.metric_tolerance, 0, float("inf"), "a difference of metrics")
        _check_range(
            "recovery_steps", self.recovery_steps, 0, float("inf"), "steps, or a share below 1", open_low=True
        )
        for name, least in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in (*RANK_RULES, "refit_steps"):
                continue
            if not _is_finite(value) or int(value) != value or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {quoted(value)}.")
            self._put(name, int(value))

    def _check_kinds(self) -> None:
        if self.per_layer is not None and not isinstance(self.per_layer, bool):
            raise ValueError(f"per_layer must be True, False or None, got {quoted(self.per_layer)}.")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {quoted(getattr(self, name))}.")
        for name in _PATTERNS:
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)):
                raise ValueError(f"{name} must be a list of names or patterns, got {quoted(value)}.")
            self._put(name, tuple(map(str, value)))  # a list could be changed later, here or by its owner

    def _check_sizes(self) -> None:
        if self.sizes is None:
            return
        sizes = _whole_numbers(self.sizes)
        if not sizes:
            raise ValueError(
                "sizes must be a list of whole numbers of at least 1, such as 64,96, or 'serving', got "
                f"{quoted(self.sizes)}."
            )
        if not any(size % self.round_to == 0 and size >= self.min_state_size for size in sizes):
            raise ValueError(
                f"sizes={sizes} holds no multiple of round_to={self.round_to} that is at least min_state_size="
                f"{self.min_state_size}. Add one, or leave out round_to and min_state_size."
            )
        self._put("sizes", sizes)


def _whole_numbers(value: Any) -> tuple[int, ...]:
    """The sizes that a word, text with commas, a number or a sequence stands for, ascending; empty if it has none."""
    if isinstance(value, str):
        value = SERVING_SIZES if value.strip() == "serving" else value.split(",")
    numbers = [_plain(part) for part in value] if isinstance(value, Iterable) else [value]
    found = [int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in numbers]
    right = all(_is_finite(part) and int(part) == part and part >= 1 for part in found)
    return tuple(sorted({int(part) for part in found})) if right else ()


def _check_range(name: str, value: Any, low: float, high: float, meaning: str, open_low: bool = False) -> None:
    """Refuse a value that is not a number in `[low, high)`, or in `(low, high)`."""
    if value is None and name in _OPTIONAL_NUMBERS:
        return
    if not _is_finite(value) or not low <= value < high or (open_low and value == low):
        interval = f"{'(' if open_low else '['}{low}, {high})"
        raise ValueError(f"{name} must lie in {interval} ({meaning}), got {quoted(value)}.")


def _is_finite(value: Any) -> bool:
    """Whether the value is a number that a float can hold; a whole number may be too large for one."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _plain(value: Any) -> Any:
    """A number, switch or text of NumPy or torch as Python's own; other values as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


Settings = CompreSSMConfig | Mapping[str, Any] | str | Path | None
"""What every function that takes settings accepts; see `as_config`."""


def as_config(settings: Settings) -> CompreSSMConfig:
    """The settings that an object, a mapping, the path of a YAML or JSON file, or None for the defaults stand for.

    Raises:
        OSError: if a file cannot be read.
        ValueError: for any other value, and as `CompreSSMConfig`, `from_dict` and `from_file`.
    """
    if isinstance(settings, CompreSSMConfig):
        return settings
    if settings is None:
        return CompreSSMConfig()
    if isinstance(settings, Mapping):
        return CompreSSMConfig.from_dict(settings)
    if isinstance(settings, str | Path):
        return CompreSSMConfig.from_file(settings)
    raise ValueError(
        f"config must be a CompreSSMConfig, a mapping such as {{'tolerance': {DEFAULT_TOLERANCE}}}, the path of a "
        f"YAML or JSON file, or None for the defaults; got {quoted(settings)}."
    )
