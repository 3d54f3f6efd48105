"""Tiny Trainer runs on the families of the table, for all tests that train."""

from itertools import count
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback
from tests.family_table import LRU, Family


class Examples(Dataset):
    def __init__(self, family: Family, rows: int = 24) -> None:
        self.rows = [{k: v[0] for k, v in family.batch(1, 8, seed).items()} for seed in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Stream(IterableDataset):
    def __init__(self, family: Family = LRU) -> None:
        self.family = family

    def __iter__(self):
        for _ in range(10):
            yield from Examples(self.family).rows


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **kwargs})


TRAINER_ARGUMENTS = (
    "optimizers",
    "optimizer_cls_and_kwargs",
    "train_dataset",
    "eval_dataset",
    "compute_metrics",
    "data_collator",
)
HALVE = {"fraction": 0.5, "end": 2, "num_cuts": 1}


def keeping_best(family: Family, best: int) -> dict[str, Any]:
    """Arguments of a Trainer that evaluates after every step, finds step `best` the best, and loads it at the end."""
    evaluations = count(1)
    return {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": Examples(family, 4),
        "compute_metrics": lambda prediction: {"score": float(next(evaluations) == best)},
        "metric_for_best_model": "score",
        "load_best_model_at_end": True,
    }


def trainer_of(family: Family, folder: Path, settings: Any = HALVE, model: Any = None, **kwargs: Any) -> Trainer:
    own = {name: kwargs.pop(name) for name in TRAINER_ARGUMENTS if name in kwargs}
    extra = kwargs.pop("callbacks", [])
    calibration = kwargs.pop("calibration", None)
    callbacks = [*([] if settings is None else [CompreSSMCallback(settings, calibration)]), *extra]
    own.setdefault("train_dataset", Examples(family))
    trainer_class = kwargs.pop("trainer_class", Trainer)
    return trainer_class(model=model or family.build(), args=arguments(folder, **kwargs), callbacks=callbacks, **own)


def callback_of(trainer: Trainer) -> CompreSSMCallback:
    return next(x for x in trainer.callback_handler.callbacks if isinstance(x, CompreSSMCallback))
