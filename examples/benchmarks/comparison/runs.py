"""One row of the comparison from its settings to its line: data, folder, Trainer, costs and figures."""

import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from clock import Clock, TimedTrainer
from measuring import machine
from rows import Results, Row, Study, key_of
from tasks import Task, make_task, most_likely
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, default_data_collator, set_seed
from transformers.utils import logging

from hf_compressm import enable_fast_selective_scan, find_last_complete_checkpoint
from hf_compressm.families import find_layers


MODEL_FOLDER = "model"
CHECKPOINTS = 5
"""Checkpoints in each run, and evaluations for the curve, unless the settings say otherwise."""
DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "eval_strategy": "steps",
    "per_device_eval_batch_size": 100,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


class Run:
    """A row that is being run.

    Args:
        study: whose row it is.
        row: what is run.
        output: folder of the results and of all runs.

    Attributes:
        folder: of this run.
        clock: its costs.
    """

    def __init__(self, study: Study, row: Row, output: Path) -> None:
        self.study, self.row, self.output = study, row, output
        self.folder = output / "runs" / row.key
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clock = Clock()
        self.done = Results(output).read()
        set_seed(row.seed)
        enable_fast_selective_scan()
        logging.disable_progress_bar()

    @cached_property
    def task(self) -> Task:
        """Its data."""
        return make_task(self.study.task)

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the study, and what the row has of its own."""
        return {**self.study.training, **self.row.training}

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return int(self.training["max_steps"])

    @property
    def sizes(self) -> list[int] | None:
        """State sizes by layer that the row is to end with, or None where it does not say."""
        return None if self.row.size_of is None else self.needed(self.row.size_of)["sizes"]

    def needed(self, name: str) -> Mapping[str, Any]:
        """Result of another row of the same seed.

        Raises:
            ValueError: if it is not there yet.
        """
        key = key_of(self.study.name, name, self.row.seed)
        if key not in self.done:
            raise ValueError(f"{self.row.key} needs the result of {key}, which is not there. Run that row first.")
        return self.done[key]

    def build(self, sizes: Sequence[int] | None = None) -> PreTrainedModel:
        """A new model, the same for the same seed and sizes."""
        set_seed(self.row.seed)
        return self.task.build(self.study.model, sizes)

    def load(self) -> PreTrainedModel:
        """The model of the row that this one comes after."""
        return self.task.load(self.output / "runs" / self.needed(self.row.after)["key"] / MODEL_FOLDER)

    def arguments(self, **others: Any) -> TrainingArguments:
        """Those of the row, but for `others`."""
        settings = {**self.training, "seed": self.row.seed, **others}
        every = max(settings["max_steps"] // CHECKPOINTS, 1)
        intervals = dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), every)
        settings = {**DEFAULTS, **intervals, **settings}
        return TrainingArguments(output_dir=str(self.folder), **settings)

    def trainer(
        self,
        model: PreTrainedModel,
        kind: type[TimedTrainer] = TimedTrainer,
        callbacks: Sequence[Any] = (),
        max_steps: int | None = None,
        learning_rate: float | None = None,
        **options: Any,
    ) -> TimedTrainer:
        """A Trainer for the task.

        Args:
            model: to train.
            kind: its class.
            callbacks: besides those of the clock.
            max_steps: other than the study's.
            learning_rate: other than the study's.
            **options: of the class.
        """
        given = {"max_steps": max_steps, "learning_rate": learning_rate}
        trainer = kind(
            model=model,
            args=self.arguments(**{name: value for name, value in given.items() if value is not None}),
            train_dataset=self.task.train,
            eval_dataset=self.task.validation,
            data_collator=default_data_collator,
            compute_metrics=self.task.metrics,
            preprocess_logits_for_metrics=most_likely,
            clock=self.clock,
            metric=self.task.metric,
            callbacks=callbacks,
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, trainer: TimedTrainer) -> None:
        """Train to the end, from the last complete checkpoint of the folder if there is one."""
        trainer.train(resume_from_checkpoint=find_last_complete_checkpoint(self.folder))

    def test(self, trainer: TimedTrainer) -> dict[str, float]:
        """Figures on the test split."""
        seen = trainer.evaluate(self.task.test, metric_key_prefix="test")
        return {name: seen[f"test_{name}"] for name in ("loss", "accuracy")}

    def tidy(self) -> None:
        """Remove the checkpoints of a row whose line is written."""
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def outcome(self, model: PreTrainedModel, **more: Any) -> dict[str, Any]:
        """The line of a finished row; saves the model.

        Args:
            model: as it is at the end.
            **more: what the arm has to add.
        """
        tested = self.test(self.trainer(model))
        model.save_pretrained(self.folder / MODEL_FOLDER)
        arguments = self.arguments()
        costs = self.clock.costs(arguments.train_batch_size, len(self.task.train))
        before = self.needed(self.row.after)["costs"]["total_seconds"] if self.row.after else 0.0
        costs |= {"inherited_seconds": before, "total_seconds": before + costs["training_seconds"]}
        row = {
            name: getattr(self.row, name)
            for name in ("key", "study", "name", "arm", "group", "seed", "size_of", "after")
        }
        return {
            **row,
            "options": dict(self.row.options),
            "task": self.task.name,
            "data": dict(self.study.task),
            "metric": self.task.metric,
            "sizes": [layer.state_size for layer in find_layers(model)],
            "parameters": model.num_parameters(),
            "test": tested,
            "curve": [(step, before + seconds, value) for step, seconds, value in self.clock.curve],
            "costs": costs,
            "training": self.training,
            "model": dict(self.study.model),
            "machine": machine(),
            "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **more,
        }
