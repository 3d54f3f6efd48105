"""The arms of `compare_matrix.py`: ways to cut the states of a delta net."""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

from channel_orders import Order, by_energy, by_rank_revealing_qr, kept_in_order
from small_training import Training
from torch import nn

from hf_compressm import CompressionResult, CompreSSMConfig, compress
from hf_compressm.families import find_layers
from hf_compressm.models import own_class


CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Arm:
    """A way to cut.

    Attributes:
        name: in tables.
        settings: of `CompreSSMConfig`, but for the size.
        order: in which channels are kept, where it is not the package's.
        during: whether models are cut by it during training too.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    order: Order | None = None
    during: bool = False


ARMS = (
    Arm("random", {"keep": "random", "refit_steps": 0}),
    Arm("energy", {"refit_steps": 0}, by_energy),
    Arm("rank-revealing QR", {"refit_steps": 0}, by_rank_revealing_qr, during=True),
    Arm("elimination", {"refit_steps": 0}, during=True),
    Arm("refit", {"refit_steps": 100}, during=True),
    Arm("projection", {"compat": "best", "refit_steps": 0}),
    Arm("best", {"compat": "best", "refit_steps": 100}),
    Arm("random, refit", {"keep": "random", "refit_steps": 100}),
    Arm("rank-revealing QR, refit", {"refit_steps": 100}, by_rank_revealing_qr),
)


def lacking(arm: Arm, model: nn.Module) -> str:
    """What the installed package lacks for an arm, or ""; a setting of 0 that it does not know is off anyway."""
    unknown = [name for name, value in arm.settings.items() if value and name not in _known()]
    if unknown:
        return f"there is no setting {', '.join(unknown)}"
    if arm.settings.get("compat") == "best" and own_class(type(model)) is None:
        return f"the package has no class for {type(model).__name__}"
    return ""


def cut(training: Training, arm: Arm, size: int) -> CompressionResult:
    """Cut a model by an arm, and carry its moments over.

    Raises:
        ValueError: if a layer was not cut.
    """
    settings = {name: value for name, value in arm.settings.items() if name in _known()}
    config, data = CompreSSMConfig(target_state_size=size, **settings), training.calibration(CALIBRATION_BATCHES)
    with kept_in_order(training.model, arm.order) if arm.order else nullcontext():
        result = compress(training.model, config, data, optimizer=training.optimizer)
    if {layer.state_size for layer in find_layers(training.model)} != {size}:
        raise ValueError(f"{arm.name}: the model was to be cut to {size} channels.\n{result.plan}")
    return result


def _known() -> set[str]:
    return {item.name for item in fields(CompreSSMConfig)}
