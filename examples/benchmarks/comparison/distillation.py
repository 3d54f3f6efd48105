"""Knowledge distillation: a student learns from the labels and from a teacher that was trained before."""

from typing import Any

import torch
import torch.nn.functional as F
from clock import TimedTrainer
from recall import IGNORED
from torch import Tensor, nn


class DistillationTrainer(TimedTrainer):
    """A Trainer in whose steps the teacher's forward comes first and the student's second.

    The loss is `(1 - mixing) * label loss + mixing * temperature^2 * KL(teacher || student)`, both softened by the
    temperature; the square keeps the gradients' size. Source: Hinton et al., arXiv 1503.02531, section 2.

    Args:
        teacher: another model for the same labels; it is not trained.
        temperature: by which both models' logits are divided, above 0.
        mixing: share of the teacher in the loss, 0 to 1.
        **arguments: those of `TimedTrainer`.

    Raises:
        ValueError: for a temperature or a mixing outside its range.
    """

    def __init__(self, *, teacher: nn.Module, temperature: float = 2.0, mixing: float = 0.5, **arguments: Any) -> None:
        if not temperature > 0 or not 0 <= mixing <= 1:
            raise ValueError(
                f"temperature must be above 0 and mixing in [0, 1]; got temperature={temperature}, mixing={mixing}."
            )
        super().__init__(**arguments)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.temperature, self.mixing = temperature, mixing

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mixed loss in training, the label loss in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad():
            wanted = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        outputs = model(**inputs)
        distance = distillation_loss(outputs.logits, wanted, inputs["labels"], self.temperature)
        loss = (1 - self.mixing) * outputs.loss + self.mixing * distance
        return (loss, outputs) if return_outputs else loss


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`temperature^2 * KL(teacher || student)`, the mean over the predictions that have a label.

    Args:
        student: logits, `(batch, classes)`, or `(batch, length, tokens)` where each predicts the next label.
        teacher: logits of the same shape.
        labels: `(batch,)` or `(batch, length)`; those of `IGNORED` do not count.
        temperature: by which both are divided.
    """
    if labels.ndim == 2:
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    scored = labels != IGNORED
    pair = [F.log_softmax(logits[scored].float() / temperature, dim=-1) for logits in (student, teacher)]
    return temperature**2 * F.kl_div(*pair, reduction="batchmean", log_target=True)
