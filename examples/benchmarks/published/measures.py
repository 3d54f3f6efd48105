"""What `published_table.py` measures of a model: perplexity, and tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


TASKS = ("lambada_openai", "piqa", "arc_easy", "arc_challenge")


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness.

    Attributes:
        tasks: their names; without any, the harness is not needed.
        folder: of YAML files of other tasks, or None.
        batch_size: of requests.
        length: of the longest request in tokens.
        limit: examples of each task, or None for all.
    """

    tasks: Sequence[str]
    folder: Path | None
    batch_size: int
    length: int
    limit: int | None

    def check(self) -> None:
        """Load the tasks, if any, so that what is missing is told before a model is cut.

        Raises:
            ValueError: if the harness is not installed, or a task cannot be loaded.
        """
        if not self.tasks:
            return
        names = ", ".join(self.tasks)
        if find_spec("lm_eval") is None:
            raise ValueError(
                f"{names} need lm-evaluation-harness, which is not installed: "
                'pip install "hf_compressm[bench]". For perplexity alone pass --tasks without a name.'
            )
        try:
            self.known.load(list(self.tasks))
        except Exception as error:  # of the harness, of datasets or of the network
            raise ValueError(
                f"--tasks {names} cannot be loaded: {type(error).__name__}: {error}. Other tasks are in YAML files in "
                "--tasks_path; without a name after --tasks only perplexity is measured."
            ) from error

    @cached_property
    def known(self) -> Any:
        """All tasks that there are; to find them takes seconds."""
        from lm_eval.tasks import TaskManager  # noqa: PLC0415 - optional

        return TaskManager(include_path=None if self.folder is None else str(self.folder))

    def figures(self, model: PreTrainedModel, tokenizer: Any) -> dict[str, dict[str, float]]:
        """By task, every metric that is a number, without its standard error."""
        if not self.tasks:
            return {}
        import lm_eval  # noqa: PLC0415 - optional
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

        options = {
            "backend": "causal",
            "batch_size": self.batch_size,
            "max_length": self.length,
            "device": str(model.device),
        }
        report = lm_eval.simple_evaluate(
            HFLM(pretrained=model.eval(), tokenizer=tokenizer, **options),
            tasks=list(self.tasks),
            task_manager=self.known,
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        return {name: _numbers(values) for name, values in report["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task; the harness writes `acc,none`, `acc_stderr,none` and the task's name."""
    found = {name.removesuffix(",none"): value for name, value in values.items() if "," in name}
    return {
        name: float(value) for name, value in found.items() if isinstance(value, int | float) and "stderr" not in name
    }


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int) -> float:
    """The exponential of the mean loss over all windows, each seen by itself.

    In a window of L tokens the L - 1 after the first are predicted, each from those before it in the window.

    Args:
        model: on any device, in any dtype; logits go to float32.
        windows: of the test text, `(windows, L)`.
        batch_size: windows at once.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for rows in windows.split(batch_size):
        rows = rows.to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        total += loss.double().cpu()
    return float((total / (len(windows) * (windows.shape[1] - 1))).exp())
