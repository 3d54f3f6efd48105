"""Whether the ranking of the states still changes; `trigger="stable"` waits until it no longer does."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from hf_compressm.compression.choices import LayerChoice
from hf_compressm.compression.measuring import from_measurements
from hf_compressm.compression.request import CutRequest
from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import Measurement
from hf_compressm.utils.processes import ALONE, Processes


Scores = Mapping[str, list[list[float]]]
"""By layer name and group, how much each state passes on; plain numbers, so that a checkpoint can keep them."""


def state_scores(
    model: nn.Module,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """Measure every state of a model by itself, `sqrt(P_ii Q_ii)` or its square, without changing the model.

    The Hankel singular values of a layer are sorted and belong to no single state. The ranking of its present states
    shows whether the same states still matter. Layers that cannot be measured are left out.

    Args:
        model: any module with SSM layers of a known family.
        config: settings.
        calibration: iterable of model-input dicts, as for `plan_compression`.
        processes: likewise.

    Raises:
        ValueError: as `plan_compression`.
    """
    return requested_scores(model, CutRequest(config, calibration, processes=processes))


def requested_scores(model: nn.Module, request: CutRequest) -> Scores:
    """Measure every state as `state_scores` does, with the arguments in a request."""

    def scores(choices: list[LayerChoice], measurements: list[Measurement]) -> Scores:
        return {
            choice.layer.name: measurement.scores.tolist()
            for choice, measurement in zip(choices, measurements, strict=True)
            if not measurement.problem
        }

    return from_measurements(scores, model, request)


def rank_stability(before: Scores, after: Scores) -> dict[str, float]:
    """Spearman's rank correlation of two measurements, layer by layer, the mean over a layer's groups.

    Returns:
        Correlations by layer name, for layers that have the same number of states in both measurements.
    """
    correlations = {}
    for name, groups in after.items():
        earlier = before.get(name, [])
        if [len(group) for group in earlier] == [len(group) for group in groups] and groups:
            pairs = zip(earlier, groups, strict=True)
            each = [rank_correlation(torch.tensor(a).double(), torch.tensor(b).double()) for a, b in pairs]
            correlations[name] = sum(each) / len(each)
    return correlations


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two rankings of the same states, from -1 to 1.

    Args:
        one: `(n,)` scores; ties share a rank.
        other: `(n,)` likewise.

    Returns:
        1 for a single state; 0 if one of the two does not distinguish the states or is not finite.
    """
    if one.numel() == 1:
        return 1.0
    ranks = [stats.rankdata(scores.double().numpy()) for scores in (one, other)]
    centred = [torch.from_numpy(rank - rank.mean()) for rank in ranks]
    scale = float(centred[0].norm() * centred[1].norm())
    finite = bool(torch.isfinite(one).all()) and bool(torch.isfinite(other).all())
    return float(centred[0] @ centred[1]) / scale if scale > 0 and finite else 0.0
