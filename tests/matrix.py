"""What a cell of the Trainer matrix is, and what every cell must hold to."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from hf_compressm.surgery import misfit, unwrap
from tests.family_table import VOCAB_SIZE, Family, ssm_layers
from tests.trainers import callback_of, trainer_of


STEPS = 20
CUTS = (6, 12)  # a cut comes at the start of the step after
SETTINGS = {"fraction": 0.4, "end": CUTS[1], "num_cuts": 2}
ALLOWED = ("is falling back to its reference PyTorch implementation",)  # the user can install the kernels it names
LIBRARIES = ("transformers", "hf_compressm", "accelerate", "torch", "trl")
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")  # the older name is deprecated where both are
    if name in {field.name for field in fields(TrainingArguments)}
)


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        name: for the test's name.
        arguments: those of `TrainingArguments`.
        extra: further arguments of `trainer_of`, each made anew for a family by a function.
        outcome: of the cut parameters' optimizer state: `"carried"`, `"reset"`, `"mixed"` or, where there is none,
            `"none"`.
        allowed: parts of warnings that may come, each with what a user can do about it.
        package: what has to be installed.
        dtype: of the model's parameters.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Callable[[Family], Any]] = field(default_factory=dict)
    outcome: str = "carried"
    allowed: dict[str, str] = field(default_factory=dict)
    package: str = ""
    dtype: torch.dtype = torch.float32


def rows(cells: list[Cell], families: list[Family], quick: set[str]) -> list[Any]:
    """A test for each cell and family; the default run has those named quick, on the first family."""
    return [
        pytest.param(
            cell,
            family,
            id=f"{cell.name}-{family.name}",
            marks=[] if cell.name in quick and family is families[0] else pytest.mark.slow,
        )
        for cell in cells
        for family in families
    ]


def texts_of_many_lengths() -> list[dict[str, Tensor]]:
    """Rows that need padding."""
    tokens = [torch.arange(3 + index % 7) * (index + 1) % VOCAB_SIZE for index in range(24)]
    return [{"input_ids": text, "labels": text} for text in tokens]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mask and ignored labels where a text is shorter than its batch."""
    tokens = [row["input_ids"] for row in rows]
    mask = pad_sequence([torch.ones_like(text) for text in tokens], batch_first=True)
    labels = pad_sequence(tokens, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": mask, "labels": labels}


class Audit(TrainerCallback):
    """Looks at model, optimizer and gradients at every step of a run; comes after the cutting callback."""

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome
        self.sizes: list[int] = []
        self.groups: dict[str, tuple[int, float]] = {}
        self.before: Mapping[str, nn.Parameter] = {}
        self.after_cut: dict[str, Tensor] = {}
        self.without_gradient: set[str] = set()
        self.skipped: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.groups = membership(kwargs["model"], kwargs["optimizer"])
        self.before = MappingProxyType(dict(kwargs["model"].named_parameters()))  # a dict of them would be refused

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], unwrap(kwargs["optimizer"])
        layer = next(iter(ssm_layers(model).values()))
        self.sizes.append(getattr(layer, "ssm_state_size", None) or layer.state_size)
        if state.global_step not in CUTS:
            return
        named = dict(model.named_parameters())
        assert membership(model, optimizer) == self.groups
        assert misfit(optimizer) == ""
        assert {id(p) for p in optimizer.state} <= {id(p) for p in named.values()}
        cut = [p for name, p in named.items() if p is not self.before[name]]
        assert cut
        has_state = [any(bool(value.any()) for value in moments_of(optimizer, p)) for p in cut]
        assert self.outcome == "mixed" or has_state == [self.outcome == "carried"] * len(cut), has_state
        self.before = MappingProxyType(named)
        self.after_cut = {name: p.detach().clone() for name, p in named.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= CUTS[-1]:
            named = kwargs["model"].named_parameters()
            self.without_gradient |= {name for name, p in named if p.grad is None or not bool(p.grad.any())}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert misfit(unwrap(kwargs["optimizer"])) == ""
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.skipped.append(state.global_step)


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer remembers of a parameter, its counts of steps left out."""
    return [x for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor) and x.numel() > 1]


def membership(model: nn.Module, optimizer: Any) -> dict[str, tuple[int, float]]:
    """Group and weight decay of every trainable parameter, after making sure that each is held once, and no other."""
    groups = unwrap(optimizer).param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(held) == sorted(names)
    return {
        names[id(parameter)]: (index, group["weight_decay"])
        for index, group in enumerate(groups)
        for parameter in group["params"]
    }


@contextmanager
def warnings_collected() -> Iterator[list[str]]:
    """What the libraries log as a warning or worse; `warnings` are errors in this test suite anyhow."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    getattr(transformers.utils.logging, "warning_once").cache_clear()  # noqa: B009 - set on the class of loggers
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield seen
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        for logger in loggers:
            logger.removeHandler(handler)


def run_cell(cell: Cell, family: Family, folder: Path, callbacks: Any = ()) -> tuple[Trainer, Audit]:
    """Train a cell's run with two cuts, and hold it to what every run must hold to."""
    if cell.package:
        pytest.importorskip(cell.package)
    audit = Audit(cell.outcome)
    arguments = {"max_steps": STEPS, "learning_rate": 1e-2, "weight_decay": 0.01, "lr_scheduler_type": "cosine"}
    extra = {name: make(family) for name, make in cell.extra.items()}
    with warnings_collected() as seen:
        model = extra.pop("model", None) or family.build(cell.dtype, state_size=16)
        trainer = trainer_of(
            family, folder, SETTINGS, model, callbacks=[*callbacks, audit], **{**arguments, **cell.arguments}, **extra
        )
        trainer.train()
    check_run(trainer, audit)
    unexpected = [text for text in seen if not any(part in text for part in (*ALLOWED, *cell.allowed))]
    assert not unexpected, unexpected
    assert [part for part in cell.allowed if not any(part in text for text in seen)] == []
    if cell.outcome == "reset":
        assert sum("reset for" in text for text in seen) == len(CUTS)
    return trainer, audit


def check_run(trainer: Trainer, audit: Audit) -> None:
    """Losses, sizes, schedule, and that every parameter still learns after the last cut."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS // trainer.args.logging_steps
    assert all(math.isfinite(entry.get(key, 0.0)) for entry in history for key in ("loss", "train_loss", "eval_loss"))
    assert [event.step for event in callback_of(trainer).events] == [*CUTS]
    assert all(event.outcome == "cut" for event in callback_of(trainer).events)
    before, between, after = (audit.sizes[i] for i in (0, CUTS[0], CUTS[1]))
    assert before > between > after
    assert [audit.sizes[i - 1] for i in CUTS] == [before, between]
    assert not audit.without_gradient, audit.without_gradient
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, audit.after_cut[name])]
    assert not still, still
    assert membership(trainer.model, trainer.optimizer) == audit.groups
    rates = [group["lr"] for group in unwrap(trainer.optimizer).param_groups]
    assert [float(rate) for rate in rates] == pytest.approx(rates_without_cuts(trainer, len(audit.skipped)))


def rates_without_cuts(trainer: Trainer, skipped: int) -> list[float]:
    """Learning rates at the end of the same schedule on an optimizer that no cut has touched."""
    args = trainer.args
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in unwrap(trainer.optimizer).param_groups]
    optimizer = torch.optim.SGD(groups, lr=args.learning_rate)
    options = dict(args.lr_scheduler_kwargs or {})
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, int(args.get_warmup_steps(STEPS)), STEPS, options)
    optimizer.step()
    if str(args.lr_scheduler_type.value) in ("reduce_lr_on_plateau", "greedy"):
        for entry in trainer.state.log_history:
            if "eval_loss" in entry:
                scheduler.step(entry["eval_loss"])
    else:
        for _ in range(STEPS - skipped):
            scheduler.step()
    return [group["lr"] for group in optimizer.param_groups]
