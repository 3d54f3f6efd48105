"""Warming up the learning rate again after a cut, without disturbing the scheduler."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


class Rewarmup:
    """A warm-up that lowers the learning rates in single steps: to 1 / (n + 1), ..., n / (n + 1) in the n after a cut.

    Args:
        steps: n, the number of steps; 0 for none.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.last_cut: int | None = None
        self._rates: list[Any] | None = None

    def share(self, step: int) -> float:
        """Share of the learning rate in the step that follows the first `step` steps."""
        if self.last_cut is None or self.steps == 0:
            return 1.0
        return min((step - self.last_cut + 1) / (self.steps + 1), 1.0)

    def lower(self, optimizer: Any, step: int) -> None:
        """Lower the rates before the optimizer steps."""
        share = self.share(step)
        if share < 1:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * share

    def restore(self, optimizer: Any) -> None:
        """Restore the rates before the scheduler sees them."""
        if self._rates is not None:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None

    def follow(self, optimizer: torch.optim.Optimizer, steps_done: Callable[[], int]) -> list[RemovableHandle]:
        """Lower and restore the rates around every step that an optimizer makes, until the hooks are removed.

        Args:
            optimizer: the optimizer.
            steps_done: returns the number of steps that are done.
        """

        def before(stepping: Any, *_: Any) -> None:
            self.restore(stepping)  # a step that failed has left them low
            self.lower(stepping, steps_done())

        return [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(lambda stepping, *_: self.restore(stepping)),
        ]
