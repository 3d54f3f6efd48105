"""A gradient scaler that skips the very step of a cut, and a compiled model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from tests.family_table import LRU, MAMBA, Family, family_id
from tests.matrix import CUTS, SETTINGS, STEPS, Cell, run_cell
from tests.trainers import trainer_of


SCALE = 2.0**8


class ScaledTrainer(Trainer):
    """fp16 autocast and a gradient scaler on the CPU, where accelerate refuses `fp16=True`."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.float16):
            return super().compute_loss(*args, **kwargs)


class Overflow(TrainerCallback):
    """Scales the loss of given steps beyond the largest float."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.before: dict[str, torch.Tensor] = {}
        self.unmoved: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}  # after a cut
        if state.global_step in self.steps:
            kwargs["optimizer"].scaler.update(new_scale=3e38)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].scaler.update(new_scale=SCALE)
        if all(torch.equal(p, self.before[name]) for name, p in kwargs["model"].named_parameters()):
            self.unmoved.append(state.global_step - 1)


@pytest.mark.parametrize("optim", ["adamw_torch", pytest.param("adamw_torch_fused", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [LRU, pytest.param(MAMBA, marks=pytest.mark.slow)], ids=family_id)
def test_a_scaler_skips_the_step_before_a_cut_and_those_of_both_cuts(
    family: Family, optim: str, tmp_path: Path
) -> None:
    overflow = Overflow((CUTS[0] - 1, *CUTS))
    cell = Cell("fp16", {"max_grad_norm": 0.0, "optim": optim}, {"trainer_class": lambda family: ScaledTrainer})
    _, audit = run_cell(cell, family, tmp_path, callbacks=[overflow])
    assert overflow.unmoved == [*overflow.steps]
    # A fused optimizer skips by itself; accelerate does not see it, and the schedule goes on.
    assert audit.skipped == ([] if "fused" in optim else [step + 1 for step in overflow.steps])


class CountGraphs(TrainerCallback):
    """How many graphs each step compiled."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = graphs()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(graphs() - self.before)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")  # dynamo and inductor look at attributes that warn
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("family", [LRU, MAMBA], ids=family_id)
def test_a_compiled_run_recompiles_once_per_cut_and_ends_as_the_eager_one(
    family: Family, backend: str, tmp_path: Path
) -> None:
    def losses(callbacks: Any, **kwargs: Any) -> list[float]:
        model = family.build(state_size=16)
        trainer = trainer_of(family, tmp_path, SETTINGS, model, max_steps=STEPS, callbacks=callbacks, **kwargs)
        trainer.train()
        assert model.config.state_size < 10
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    eager = losses([])
    torch.compiler.reset()
    count = CountGraphs()
    compiled = losses([count], torch_compile=True, torch_compile_backend=backend)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert [step for step, number in enumerate(count.counts) if number] == [0, *CUTS]
    assert [count.counts[step] for step in CUTS] == [1, 1]
