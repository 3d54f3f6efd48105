"""The cuts that several tolerances would make in one model, which is measured once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_compressm.compression.choices import LayerChoice
from hf_compressm.compression.measuring import from_measurements, judged
from hf_compressm.compression.plan import CompressionPlan
from hf_compressm.compression.planning import loss_change, marked, plan_sizes
from hf_compressm.compression.rank_rules import choose_sizes
from hf_compressm.compression.request import CutRequest
from hf_compressm.config import RANK_RULES, CompreSSMConfig, Settings, as_config
from hf_compressm.families import Measurement, find_layers, refuse_single_batch


@dataclass(frozen=True, eq=False)
class Alternative:
    """The cut that one tolerance would make in a model.

    Attributes:
        tolerance: share of the sum of the HSVs that may be discarded.
        plan: the cut.
        parameters: number of the model's parameters after it.
        state_bytes: bytes of one sequence's state after it, all layers together, in the dtype of their parameters.
    """

    tolerance: float
    plan: CompressionPlan
    parameters: int
    state_bytes: int


def compare_tolerances(
    model: nn.Module,
    tolerances: Sequence[float],
    config: Settings = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> list[Alternative]:
    """Plan a cut for each tolerance, without changing the model; nothing is fitted unless the settings say so.

    Args:
        model: any module with SSM layers of a known family.
        tolerances: shares of the sum of the HSVs that may be discarded, each between 0 and 1.
        config: all other settings; its own rank rule is ignored.
        calibration: iterable of model-input dicts, needed by selective layers.

    Raises:
        ValueError: as `plan_compression`.
    """
    wanted = as_config(config)
    others = wanted.to_dict() | dict.fromkeys(RANK_RULES) | {"refit_steps": wanted.refit_steps or 0}
    settings = [CompreSSMConfig.from_dict({**others, "tolerance": tolerance}) for tolerance in tolerances]

    def plan(choices: list[LayerChoice], measurements: list[Measurement]) -> list[CompressionPlan]:
        measurements = judged(choices, measurements, settings[0])
        plans = [
            marked(plan_sizes(choices, measurements, choose_sizes(choices, measurements, setting), setting))
            for setting in settings
        ]
        if not by_loss:
            return plans
        return [replace(each, predicted_loss_change=loss_change(model, request, each)) for each in plans]

    by_loss = settings[0].criterion == "fisher"
    if by_loss and calibration is not None:  # which is run once more for every tolerance
        refuse_single_batch(calibration)
        calibration = list(calibration)
    request = CutRequest(settings[0], calibration)
    plans = from_measurements(plan, model, request)
    return [_alternative(model, *pair) for pair in zip(tolerances, plans, strict=True)]


def count_state_bytes(model: nn.Module, plan: CompressionPlan | None = None) -> int:
    """Bytes of one sequence's state in all SSM layers, now or after a planned cut."""
    sizes = {} if plan is None else {layer.name: layer.new_state_size for layer in plan.layers}
    return sum(layer.state_bytes(sizes.get(layer.name, layer.state_size)) for layer in find_layers(model))


def _alternative(model: nn.Module, tolerance: float, plan: CompressionPlan) -> Alternative:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for cut in (layer.cut for layer in plan.layers if layer.cut is not None):
        parameters += sum(change.value.numel() - change.parameter.numel() for change in cut.changes)
        parameters += sum(addition.value.numel() for addition in cut.additions)
    return Alternative(tolerance, plan, parameters, count_state_bytes(model, plan))
