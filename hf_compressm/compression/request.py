"""What one cut is asked to do, in one value that travels from the Trainer down to the maths."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_compressm.config import CompreSSMConfig
from hf_compressm.utils.processes import ALONE, Processes


@dataclass(frozen=True, eq=False)
class CutRequest:
    """All that a cut depends on, besides the model.

    Attributes:
        config: settings.
        calibration: iterable of model-input dicts, needed by selective layers and by `criterion="empirical"`.
        optimizer: the optimizer that trains the model, if any.
        step: optimizer steps done, for the record in the model's config.
        reduction_share: share of the states that the rank rule would drop which this cut drops; below 1 it is gentler.
        processes: those that train the model together and cut it together, each with calibration batches of its own,
            or none but for the first. What they see is added up, and the plan of the first is that of all.
    """

    config: CompreSSMConfig
    calibration: Iterable[Mapping[str, Any]] | None = None
    optimizer: Any = None
    step: int | None = None
    reduction_share: float = 1.0
    processes: Processes = ALONE
