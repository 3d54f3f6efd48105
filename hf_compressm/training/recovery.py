"""Whether to keep a cut: decided later, by the Trainer's own metric; until then a checkpoint is kept for a rollback.

With `fraction` this is the paper's "pragmatic" mode: cut a share of the states, and go back if the metric does not
recover. In the paper that ends the cuts; here the next one is gentler.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from hf_compressm.checkpoints import wait_for_seal
from hf_compressm.compression.history import CutEvent
from hf_compressm.config import CompreSSMConfig
from hf_compressm.files.atomic import link_or_copy
from hf_compressm.files.names import KEPT_PREFIX
from hf_compressm.loops.schedule import resolve
from hf_compressm.utils.checks import quoted


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Recovery:
    """A cut that waits for its metric.

    Attributes:
        step: optimizer steps before the cut.
        due: step after which the metric is compared.
        folder: checkpoint from before the cut, in the run's output directory.
        before: the metric before the cut.
        after: the metric at `due`, once it is known.
        worse: the verdict, once it is known.
    """

    step: int
    due: int
    folder: str
    before: float
    after: float | None = None
    worse: bool | None = None

    def judged(self, after: float, tolerance: float, greater_is_better: bool) -> "Recovery":
        """The same cut with its verdict; a metric that is not a number counts as worse."""
        loss = self.before - after if greater_is_better else after - self.before
        return replace(self, after=after, worse=not loss <= tolerance)


class RecoveryGuard:
    """A guard that waits for the metric after each cut; it does nothing without `recovery_steps`.

    Args:
        config: settings.

    Attributes:
        pending: the cut that waits for its metric, or for its rollback.
    """

    def __init__(self, config: CompreSSMConfig) -> None:
        """Start with no cut seen."""
        self._config = config
        self.pending: Recovery | None = None
        self._metric_before: float | None = None

    @property
    def is_on(self) -> bool:
        """Whether the settings ask for it."""
        return self._config.recovery_steps is not None

    def wants_metric(self, step: int, cut_follows: bool) -> bool:
        """Whether this step needs an evaluation: a cut comes next, or a recovery is over."""
        return self.is_on and (cut_follows or (self.pending is not None and step == self.pending.due))

    def lacks_metric(self, step: int, cut_follows: bool) -> bool:
        """Whether a step that needed an evaluation is over without one."""
        due = self.pending is not None and self.pending.worse is None and step >= self.pending.due
        return self.is_on and (due or (cut_follows and self._metric_before is None))

    def see(self, args: TrainingArguments, step: int, metrics: Mapping[str, float], cut_follows: bool) -> None:
        """Note the metric before a cut, and judge a recovery that is over."""
        value = metrics.get(metric_name(args))
        if not self.is_on or value is None:  # None: the evaluation of another dataset
            return
        if cut_follows:
            self._metric_before = float(value)
        pending = self.pending
        if pending is None or pending.worse is not None or step < pending.due:
            return
        judged = pending.judged(float(value), self._config.metric_tolerance or 0.0, greater_is_better(args))
        self.pending = judged if judged.worse else None
        if not judged.worse:
            logger.info(f"CompreSSM keeps the cut after step {judged.step}: {judged.before:.4g} -> {value:.4g}.")

    def keep(self, run_folder: Path, step: int) -> str | None:
        """Keep the checkpoint from before a cut out of the Trainer's rotation; returns its name, None without metric.

        Raises:
            ValueError: if there is no such checkpoint.
        """
        if self.is_on and self._metric_before is None:
            logger.warning(f"The cut after step {step} has no metric from before it, so it will not be rolled back.")
        return keep_checkpoint(run_folder / f"checkpoint-{step}") if self._metric_before is not None else None

    def begin(self, event: CutEvent, kept: str | None, max_steps: int) -> None:
        """Wait for the metric of a cut that was just made."""
        if kept is not None and self._metric_before is not None and event.outcome == "cut":
            due = event.step + recovery_length(self._config, max_steps)
            self.pending = Recovery(event.step, due, kept, self._metric_before)
        self._metric_before = None

    def end(self) -> None:
        """Note that the pending cut was rolled back."""
        self.pending = None

    def left_over(self, run_folder: Path) -> list[Path]:
        """The kept checkpoints that no rollback needs."""
        kept = run_folder.glob(f"{KEPT_PREFIX}checkpoint-*")
        return [folder for folder in kept if self.pending is None or folder.name != self.pending.folder]

    def clean(self, run_folder: Path) -> None:
        """Remove kept checkpoints that no rollback needs, now that another checkpoint is complete.

        This includes those of a run that was interrupted.
        """
        for kept in self.left_over(run_folder):
            shutil.rmtree(kept, ignore_errors=True)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-ready."""
        return {"pending": asdict(self.pending) if self.pending else None, "metric_before": self._metric_before}

    def restore(self, state: Mapping[str, Any], run_folder: Path) -> None:
        """Resume from what a checkpoint kept.

        Raises:
            ValueError: if that has another form, or the checkpoint to go back to is missing.
        """
        metric, values = state.get("metric_before"), state.get("pending")
        if metric is not None and not isinstance(metric, int | float):
            raise ValueError(f"The callback's state holds a metric that is not a number, {quoted(metric)}.")
        self._metric_before = metric
        if values is None:
            return
        pending = _read(values)
        if pending.folder != f"{KEPT_PREFIX}checkpoint-{pending.step}" or not (run_folder / pending.folder).is_dir():
            raise ValueError(
                f"The cut after step {pending.step} waits for its metric, and the checkpoint to go back to, "
                f"{pending.folder} in {run_folder}, is missing. Put it back, or resume from an earlier checkpoint."
            )
        self.pending = pending


def _read(values: Any) -> Recovery:
    """A recovery from a checkpoint; its folder is removed later, so only a step may vary in the folder's name."""
    if not isinstance(values, Mapping) or any(item.name not in values for item in fields(Recovery)):
        raise ValueError(f"The callback's state holds a recovery that cannot be read, {quoted(values)}.")
    pending = Recovery(**{item.name: values[item.name] for item in fields(Recovery)})
    steps, numbers = (pending.step, pending.due), (pending.before, pending.after)
    fine = all(type(step) is int for step in steps) and isinstance(pending.folder, str)
    fine = fine and all(isinstance(number, int | float) for number in numbers if number is not None)
    if not fine or pending.before is None or pending.worse not in (None, True, False):
        raise ValueError(f"The callback's state holds a recovery that cannot be read, {quoted(values)}.")
    return pending


def keep_checkpoint(checkpoint: Path) -> str:
    """Copy a checkpoint to where the Trainer does not remove it, by hard links if the file system has them.

    Args:
        checkpoint: a `checkpoint-<step>` directory that was just saved.

    Returns:
        Name of the copy, beside it.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    wait_for_seal(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is missing: the checkpoint from before a cut was not saved, or was removed.")
    kept = checkpoint.with_name(KEPT_PREFIX + checkpoint.name)
    shutil.rmtree(kept, ignore_errors=True)  # of a run that was interrupted here
    try:
        shutil.copytree(checkpoint, kept, copy_function=link_or_copy)
    except BaseException:
        shutil.rmtree(kept, ignore_errors=True)
        raise
    return kept.name


def metric_name(args: TrainingArguments) -> str:
    """Name of the metric that decides about a recovery, as it is in the Trainer's logs."""
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def greater_is_better(args: TrainingArguments) -> bool:
    """Whether that metric is better when it is greater, as the Trainer's arguments say."""
    return bool(args.greater_is_better) if args.metric_for_best_model else False


def recovery_length(config: CompreSSMConfig, max_steps: int) -> int:
    """`recovery_steps` in steps, at least 1; 0 without it."""
    return 0 if config.recovery_steps is None else max(resolve("recovery_steps", config, max_steps), 1)
