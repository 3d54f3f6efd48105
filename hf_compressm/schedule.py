"""When cuts happen."""

from transformers.utils import logging

from hf_compressm.config import CompreSSMConfig


logger = logging.get_logger(__name__)


def cut_steps(config: CompreSSMConfig, max_steps: int) -> tuple[int, ...]:
    """Optimizer steps after which cuts happen, ascending; a cut at step k comes at the start of step k + 1.

    `num_cuts` steps evenly spaced after `start` and up to `end`, the last one at `end`; or every `interval` steps.

    Args:
        config: settings.
        max_steps: optimizer steps of the run.

    Raises:
        ValueError: if no cut could happen: unknown length, `end` not after `start`, or all steps outside the run.
    """
    if max_steps <= 0:
        raise ValueError(f"The number of training steps is not known (max_steps={max_steps}); set max_steps.")
    start, end = (_resolve(name, getattr(config, name), max_steps) for name in ("start", "end"))
    if end <= start:
        raise ValueError(
            f"No cut can happen: end={config.end:g} is step {end}, not after start={config.start:g}, step {start} "
            f"(of {max_steps}). Raise end, or train for more steps."
        )
    if config.interval is None:
        wanted = [start + (end - start) * number / config.num_cuts for number in range(1, config.num_cuts + 1)]
    else:
        interval = max(_resolve("interval", config.interval, max_steps), 1)
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


def _resolve(name: str, value: float, max_steps: int) -> int:
    """A step number; values below 1 are a share of `max_steps`."""
    if value < 1:
        return round(value * max_steps)
    if int(value) != value:
        raise ValueError(f"{name} must be a whole number of steps, or a share below 1; got {value}.")
    return int(value)
