"""Training a model on after a cut, with fresh moments, up to a step; an interrupted training goes on."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_compressm import find_last_complete_checkpoint


@dataclass(frozen=True)
class Recovery:
    """How a model is trained on.

    Attributes:
        steps: after which it is measured, ascending.
        save_steps: between checkpoints.
        training: fields of `TrainingArguments` that decide the result.
    """

    steps: Sequence[int]
    save_steps: int
    training: dict[str, Any] = field(default_factory=dict)

    def checkpoint(self, folder: Path, until: int) -> Path | None:
        """The last complete checkpoint of a folder, from which `until` can be reached; later ones are removed."""
        while (found := find_last_complete_checkpoint(folder)) is not None:
            if step_of(Path(found)) <= until:
                return Path(found)
            shutil.rmtree(found)
        return None

    def train(self, model: PreTrainedModel, folder: Path, until: int, rows: Tensor) -> Path:
        """Train a model up to a step; from the last checkpoint of the folder, if there is one.

        The learning rate is constant after a warm-up, so that fewer steps are the beginning of more.

        Args:
            model: as it was cut, or as the last checkpoint has it.
            folder: of the checkpoints of this training.
            until: the step to reach.
            rows: to train on, `(rows, length)`.

        Returns:
            The checkpoint of that step. It is for the caller to load: the model that was trained may be left in
            autocast.
        """
        last = self.checkpoint(folder, until)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=until,
                lr_scheduler_type="constant_with_warmup",
                save_strategy="steps",
                save_steps=self.save_steps,
                save_total_limit=1,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.accelerator.is_available(),
                **self.training,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            data_collator=default_data_collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        return folder / f"checkpoint-{until}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(checkpoint.name.rpartition("-")[2])
