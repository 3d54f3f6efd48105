"""What is told at the end of a run in which nothing was cut."""

from collections.abc import Sequence

from transformers.utils import logging

from hf_compressm.compression.history import CutEvent
from hf_compressm.config import CompreSSMConfig


logger = logging.get_logger(__name__)


def tell_outcome(
    events: Sequence[CutEvent], config: CompreSSMConfig, when: str, step: int, earlier_cut: int | None
) -> None:
    """Warn at the end of a run in which nothing was cut.

    Args:
        events: attempts of the run.
        config: its settings.
        when: a description of when cuts come.
        step: optimizer steps done.
        earlier_cut: step of the last cut in the model's record; None without one.
    """
    tried = [event for event in events if event.outcome != "rolled back"]
    if not tried and earlier_cut is None:
        logger.warning(f"CompreSSM cut nothing: training ended at step {step}; cuts come {when}.")
    elif tried and not any(event.outcome == "cut" for event in tried):
        layers = tried[-1].result.plan.layers
        reasons = {f"{layer.name}: {layer.reason}" for layer in layers}
        rule = config.rank_rule
        sizes = " or smaller sizes" if config.sizes else ""
        way = "smaller" if rule in ("target_state_size", "budget") else "larger"
        more = f" A {way} {rule}{sizes} would cut more."
        undone = sum(event.outcome == "undone" for event in tried)
        logger.warning(
            f"CompreSSM tried {len(tried)} cut(s) and none shrank a layer; {undone} were undone by the guard "
            f"({'; '.join(sorted(reasons))}).{more * any(layer.status == 'kept' for layer in layers)}"
        )
