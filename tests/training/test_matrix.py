"""Cuts beside everything else that a Trainer can be told to do: 20 steps, two cuts, and nothing may suffer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.family_table import LRU, MAMBA, S5, S5_CLASSIFIER, Family
from tests.matrix import CHECKPOINTING, Cell, padded, rows, run_cell, texts_of_many_lengths
from tests.trainers import Examples, Stream


def evaluated(**scheduler: Any) -> dict[str, Any]:
    return {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss", **scheduler}


evaluation = {"eval_dataset": lambda family: Examples(family, 4)}
schedule = "lr_scheduler_type"
options = "lr_scheduler_kwargs"

ENGINES = [
    Cell("plain"),
    Cell("bf16 autocast", {"bf16": True}),
    Cell("bf16 parameters", {"learning_rate": 5e-2, schedule: "constant"}, dtype=torch.bfloat16),
    Cell("accumulation", {"gradient_accumulation_steps": 3}),
    Cell("checkpointing reentrant", {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}),
    Cell("checkpointing", {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}),
    Cell("no clipping", {"max_grad_norm": 0.0}),
    Cell("clipping", {"max_grad_norm": 0.1}),
    Cell("iterable", extra={"train_dataset": lambda family: Stream(family)}),
    Cell("steady logs", {"logging_steps": 5, "logging_nan_inf_filter": False}),
]
TOKENS = [
    Cell(
        "by length",
        {"train_sampling_strategy": "group_by_length"},
        {"train_dataset": lambda family: texts_of_many_lengths(), "data_collator": lambda family: padded},
    ),
    Cell("neftune", {"neftune_noise_alpha": 5.0}),
]
SCHEDULES = [
    Cell("linear", {schedule: "linear", "warmup_steps": 3}),
    Cell("cosine warmup", {schedule: "cosine", "warmup_steps": 3}),
    Cell("cosine_with_restarts", {schedule: "cosine_with_restarts", options: {"num_cycles": 2}}),
    Cell("polynomial", {schedule: "polynomial", options: {"power": 2.0, "lr_end": 1e-4}}),
    Cell("constant", {schedule: "constant"}),
    Cell("constant_with_warmup", {schedule: "constant_with_warmup", "warmup_steps": 3}),
    Cell("inverse_sqrt", {schedule: "inverse_sqrt", "warmup_steps": 3, options: {"timescale": 5}}),
    Cell("plateau", evaluated(**{schedule: "reduce_lr_on_plateau", options: {"patience": 0}}), evaluation),
    Cell("greedy", evaluated(**{schedule: "greedy", options: {"patience": 0, "min_lr": 1e-4}}), evaluation),
    Cell("cosine_with_min_lr", {schedule: "cosine_with_min_lr", options: {"min_lr": 1e-3}}),
    Cell("cosine_warmup_with_min_lr", {schedule: "cosine_warmup_with_min_lr", options: {"min_lr": 1e-3}}),
    Cell("warmup_stable_decay", {schedule: "warmup_stable_decay", "warmup_steps": 3, options: {"num_decay_steps": 5}}),
]
QUICK = {"checkpointing", "accumulation", "bf16 parameters", "neftune", "plateau", "plain"}


@pytest.mark.parametrize(
    ("cell", "family"),
    [
        *rows(ENGINES, [MAMBA, LRU, S5, S5_CLASSIFIER], QUICK),
        *rows(TOKENS, [LRU, MAMBA, S5], QUICK),
        *rows(SCHEDULES, [LRU, MAMBA], QUICK),
    ],
)
def test_a_run_with_two_cuts(cell: Cell, family: Family, tmp_path: Path) -> None:
    run_cell(cell, family, tmp_path)
