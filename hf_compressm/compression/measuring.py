"""Measuring the layers of a model, in one process or in several."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn
from transformers.utils import logging

from hf_compressm.compression.choices import LayerChoice, check_settings
from hf_compressm.compression.request import CutRequest
from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import Measurement, SSMLayer, Statistics, collect_statistics
from hf_compressm.utils.modes import outside_inference, plain_modes
from hf_compressm.utils.processes import Processes
from hf_compressm.utils.threads import for_each


logger = logging.get_logger(__name__)


T = TypeVar("T")


def from_measurements(
    work: Callable[[list[LayerChoice], list[Measurement]], T],
    model: nn.Module,
    request: CutRequest,
) -> T:
    """The result of `work` on the layers that the settings pick and their measurements; the model does not change.

    Args:
        work: done by the first process alone; every process gets its result.
        model: any module with SSM layers of a known family.
        request: settings, calibration and processes.

    Raises:
        ValueError: as `plan_compression`, except for NaN and Inf; and what `work` raises.
    """
    processes = request.processes
    with processes.together(), outside_inference():  # the model itself runs in the other modes of its owner
        calibrated, training = request.calibration is not None, request.step is not None
        choices = check_settings(model, request.config, calibrated, training)
        statistics = _collect(model, choices, request)

    def measured() -> T:
        return work(choices, for_each(lambda pair: _measure(*pair), zip(choices, statistics, strict=True)))

    with plain_modes():
        _add_up([item for item in statistics if item is not None], model, processes)
        return processes.first(measured, model)


def try_calibration(model: nn.Module, request: CutRequest) -> list[tuple[SSMLayer, Statistics | None]]:
    """Run the calibration batches as a cut would.

    Returns:
        The layers, each with what the batches show of it in this process.

    Raises:
        ValueError: if one of them cannot be used.
    """
    with request.processes.together():
        choices = check_settings(model, request.config, calibrated=True)
        seen = _collect(model, choices, request)
    return [(choice.layer, item) for choice, item in zip(choices, seen, strict=True)]


def _collect(model: nn.Module, choices: Sequence[LayerChoice], request: CutRequest) -> list[Statistics | None]:
    layers, methods = [choice.layer for choice in choices], [choice.method for choice in choices]
    may_be_empty = not request.processes.is_first
    return collect_statistics(model, layers, methods, request.calibration, request.forward, may_be_empty)


def measured_again(model: nn.Module, choices: Sequence[LayerChoice], request: CutRequest) -> list[Measurement]:
    """Measurements of some layers in this process alone, while a plan is made and others stand in before them."""
    with outside_inference():
        statistics = _collect(model, choices, request)
    return for_each(lambda pair: _measure(*pair), zip(choices, statistics, strict=True))


def _measure(choice: LayerChoice, seen: Statistics | None) -> Measurement:
    measurement = choice.layer.family.measure(choice.layer, choice.method, seen)
    return replace(measurement, shortage="" if seen is None else seen.shortage(choice.layer.state_size))


def _add_up(statistics: Sequence[Statistics], model: nn.Module, processes: Processes) -> None:
    """Add the statistics of the other processes to those of the first."""
    if processes.size == 1 or not statistics:
        return
    added = processes.add_up([item.sums for item in statistics], next(model.parameters()).device)
    samples = processes.gather([item.samples for item in statistics])
    for number, (item, total) in enumerate(zip(statistics, added, strict=True)):
        item.sums = total
        every = [seen[number] for seen in samples]
        item.samples = {name: [rows for seen in every for rows in seen.get(name, ())] for name in every[0]}


def judged(
    choices: Sequence[LayerChoice], measurements: Sequence[Measurement], config: CompreSSMConfig
) -> list[Measurement]:
    """The measurements, with a problem where too few tokens were seen for the spectrum to decide; warns of problems.

    Raises:
        ValueError: for NaN or Inf under `on_nonfinite="raise"`.
    """
    if config.rank_rule in ("tolerance", "max_error", "budget"):
        measurements = [replace(one, problem=one.problem or one.shortage) for one in measurements]
    for choice, measurement in zip(choices, measurements, strict=True):
        layer = choice.layer
        if not measurement.problem:
            if measurement.shortage:
                logger.warning(f"{layer.name} is cut to the size that the settings name, but {measurement.shortage}.")
            continue
        if config.on_nonfinite == "raise" and "non-finite" in measurement.problem:
            raise ValueError(
                f"{layer.name} has {measurement.problem}. Go back to an earlier checkpoint, or pass "
                "on_nonfinite='skip' to leave such layers alone."
            )
        logger.warning(f"{layer.name} is not cut: {measurement.problem}.")
    return list(measurements)
