"""Whether the ranking of the states still moves: what `trigger="stable"` waits for."""

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
"""By layer name and group, what each state passes on by itself; plain numbers, so that a checkpoint can keep them."""


def state_scores(
    model: nn.Module,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """Measure every state of a model by itself, `sqrt(P_ii Q_ii)` or its square; touches nothing.

    The Hankel singular values of a layer are sorted and belong to no state; the ranking of its present states does
    tell whether those that matter are still the same. Layers that cannot be measured are left out.

    Args:
        model: any module with SSM layers of a known family.
        config: settings.
        calibration: iterable of model-input dicts, as for `plan_compression`.
        processes: likewise.

    Raises:
        ValueError: as `plan_compression`.
    """

    def scores(choices: list[LayerChoice], measurements: list[Measurement]) -> Scores:
        return {
            choice.layer.name: measurement.scores.tolist()
            for choice, measurement in zip(choices, measurements, strict=True)
            if not measurement.problem
        }

    return from_measurements(scores, model, CutRequest(config, calibration, processes=processes))


def rank_stability(before: Scores, after: Scores) -> dict[str, float]:
    """Spearman's rank correlation of two measurements, layer by layer, the mean over a layer's groups.

    Returns:
        By name, the layers that both measurements have with the same number of states.
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
        1 where there is one state alone, 0 where one of the two does not tell the states apart or is not finite.
    """
    if one.numel() == 1:
        return 1.0
    ranks = [stats.rankdata(scores.double().numpy()) for scores in (one, other)]
    centred = [torch.from_numpy(rank - rank.mean()) for rank in ranks]
    scale = float(centred[0].norm() * centred[1].norm())
    finite = bool(torch.isfinite(one).all()) and bool(torch.isfinite(other).all())
    return float(centred[0] @ centred[1]) / scale if scale > 0 and finite else 0.0
