"""When has the order of the states settled? Scores of all states over training, compared with those at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sampling import fixed_batches
from transformers import TrainerCallback

from hf_compressm import CompreSSMConfig
from hf_compressm.compression import Scores, rank_stability, state_scores
from hf_compressm.files.atomic import read_json, write_json


RANKING_FILE = "ranking.json"
KEPT_SHARE = 8
"""The overlap is that of the best eighth of the states."""
SETTLED = (0.8, 0.9, 0.95)
"""Correlations with the final order; a ranking has settled where it stays above."""


class RankingRecorder(TrainerCallback):
    """Measures at evenly spaced steps what each state passes on by itself, always on the same batches.

    Args:
        folder: of the run; the scores are kept there for a run that is interrupted.
        max_steps: of the run.
        count: of measurements, the last one at the end.
        settings: that say how states are ranked.
    """

    def __init__(self, folder: Path, max_steps: int, count: int, settings: CompreSSMConfig | None = None) -> None:
        self.path = folder / RANKING_FILE
        self.steps = sorted({max(round(max_steps * number / count), 1) for number in range(1, count + 1)})
        self.settings = settings or CompreSSMConfig()
        self.scores: dict[int, Scores] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with what was measured before an interruption."""
        if state.global_step and self.path.exists():
            self.scores = {int(step): scores for step, scores in read_json(self.path).items()}
            self.scores = {step: scores for step, scores in self.scores.items() if step <= state.global_step}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is time to."""
        if state.global_step not in self.steps:
            return
        loader = kwargs["train_dataloader"]
        batches = fixed_batches(loader, args.per_device_train_batch_size, self.settings.calibration_batches, seed=0)
        self.scores[state.global_step] = state_scores(kwargs["model"], self.settings, batches)
        write_json(self.path, {str(step): scores for step, scores in self.scores.items()})

    def summary(self) -> dict[str, Any]:
        """Correlation and overlap with the final order at each step, and the shares at which it has settled."""
        steps = sorted(self.scores)
        last = self.scores[steps[-1]]
        points = [
            {"share": step / steps[-1], **agreement(self.scores[step], last)}
            | {"with_previous": agreement(self.scores[before], self.scores[step])["correlation"] if before else None}
            for before, step in zip([None, *steps], steps, strict=False)
        ]
        return {"points": points, "settled": {str(level): settled_at(points, level) for level in SETTLED}}


def agreement(scores: Scores, last: Scores) -> dict[str, float]:
    """Spearman's rank correlation, and the share of the best states that are the same: means over layers."""
    correlations = list(rank_stability(scores, last).values())
    overlaps = [overlap(one, other) for name in last for one, other in zip(scores[name], last[name], strict=True)]
    return {"correlation": sum(correlations) / len(correlations), "overlap": sum(overlaps) / len(overlaps)}


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Share of the best eighth of the states of one measurement that are among those of the other."""
    count = max(len(one) // KEPT_SHARE, 1)
    best = [set(sorted(range(len(scores)), key=lambda i, s=scores: -s[i])[:count]) for scores in (one, other)]
    return len(best[0] & best[1]) / count


def settled_at(points: Sequence[Mapping[str, float]], level: float) -> float:
    """Share of training from which on the correlation with the final order stays at `level` or above."""
    share = 1.0
    for point in reversed(points):
        if point["correlation"] < level:
            break
        share = point["share"]
    return share
