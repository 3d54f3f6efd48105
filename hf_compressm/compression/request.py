"""The request for one cut: one value, passed from the Trainer down to the maths."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_compressm.config import CompreSSMConfig
from hf_compressm.families.statistics import Forward, run_batch
from hf_compressm.utils.processes import ALONE, Processes


@dataclass(frozen=True, eq=False)
class CutRequest:
    """Everything that a cut depends on besides the model.

    Attributes:
        config: settings.
        calibration: iterable of batches, needed by selective layers and by `criterion="empirical"`.
        optimizer: the optimizer that trains the model, if any.
        step: optimizer steps done, for the record in the model's config.
        reduction_share: share of the rank rule's reduction that this cut makes; below 1 it drops fewer states.
        processes: the processes that train the model and cut it together, each with its own calibration batches; only
            the first must have some. Their statistics are added up, and all use the plan of the first.
        forward: runs the model on one calibration batch.
    """

    config: CompreSSMConfig
    calibration: Iterable[Any] | None = None
    optimizer: Any = None
    step: int | None = None
    reduction_share: float = 1.0
    processes: Processes = ALONE
    forward: Forward = run_batch
