"""Every optimizer that a Trainer offers: carried over a cut, reset with a word, or refused at the start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.surgery import misfit, reset
from tests.family_table import LRU, MAMBA, MAMBA2, S5, Family, family_id, ssm_layers, train_step
from tests.matrix import SETTINGS, Cell, rows, run_cell
from tests.trainers import trainer_of


RESET = {"reset for": "another optimizer carries its state, and optimizer_state='reset' says that none is wanted"}


def of_class(get: Any, **kwargs: Any) -> dict[str, Any]:
    """A Trainer that builds an optimizer for which it has no name."""
    return {"optimizer_cls_and_kwargs": lambda family: (get(), {"lr": 1e-2, **kwargs})}


def from_package(package: str, name: str) -> Any:
    return lambda: getattr(pytest.importorskip(package), name)


large = {"model": lambda family: family.build(hidden_size=192, state_size=96)}  # 4096 numbers and more are in 8 bits
momentum = "momentum=0.9"
CARRIED = [
    Cell("adamw_torch", {"optim": "adamw_torch"}),
    Cell("adamw_torch_fused", {"optim": "adamw_torch_fused"}),
    Cell("amsgrad", extra=of_class(lambda: torch.optim.AdamW, amsgrad=True)),
    Cell("adafactor", {"optim": "adafactor"}),
    Cell("sgd", {"optim": "sgd", "learning_rate": 0.1}, outcome="none"),
    Cell("sgd momentum", {"optim": "sgd", "optim_args": momentum, "learning_rate": 0.1}),
    Cell("rmsprop", {"optim": "rmsprop"}),
    Cell("adagrad", {"optim": "adagrad"}),
    Cell("nadam", extra=of_class(lambda: torch.optim.NAdam)),
    Cell("radam", extra=of_class(lambda: torch.optim.RAdam)),
    Cell("lion_32bit", {"optim": "lion_32bit"}, package="bitsandbytes"),
    Cell("adamw of bitsandbytes", extra=of_class(from_package("bitsandbytes.optim", "AdamW")), package="bitsandbytes"),
    Cell("rmsprop_bnb_32bit", {"optim": "rmsprop_bnb_32bit"}, package="bitsandbytes"),
    Cell("lion-pytorch", extra=of_class(from_package("lion_pytorch", "Lion")), package="lion_pytorch"),
]
RESETTING = [
    Cell(
        "rmsprop momentum",
        {"optim": "rmsprop", "optim_args": momentum, "learning_rate": 1e-3},
        outcome="reset",
        allowed=RESET,
    ),
    Cell("adamax", extra=of_class(lambda: torch.optim.Adamax), outcome="reset", allowed=RESET),
    Cell("adadelta", extra=of_class(lambda: torch.optim.Adadelta), outcome="reset", allowed=RESET),
    Cell("ademamix", {"optim": "ademamix"}, outcome="reset", allowed=RESET, package="bitsandbytes"),
    Cell("adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}, large, "mixed", RESET, "bitsandbytes"),
    Cell("lion_8bit", {"optim": "lion_8bit"}, large, "mixed", RESET, "bitsandbytes"),
    Cell("rmsprop_bnb_8bit", {"optim": "rmsprop_bnb_8bit"}, large, "mixed", RESET, "bitsandbytes"),
]
QUICK = {"sgd momentum", "adagrad", "lion_32bit", "rmsprop momentum"}


@pytest.mark.parametrize(("cell", "family"), rows([*CARRIED, *RESETTING], [LRU, MAMBA, S5], QUICK))
def test_a_run_with_two_cuts(cell: Cell, family: Family, tmp_path: Path) -> None:
    run_cell(cell, family, tmp_path)


def test_eight_bits_are_reset_parameter_by_parameter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = LRU.build(hidden_size=192, state_size=32)
    kinds: list[tuple[int, bool]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:  # comes after the cut
                layer = next(iter(ssm_layers(kwargs["model"]).values()))
                states = kwargs["optimizer"].optimizer.state
                kinds.extend((p.numel(), bool(states.get(p))) for p in (layer.nu_log, layer.C_re))

    settings = {"target_state_size": 24, "end": 2, "num_cuts": 1}
    trainer_of(LRU, tmp_path, settings, model, callbacks=[Look()], max_steps=4, optim="adamw_bnb_8bit").train()
    assert kinds == [(24, True), (24 * 192, False)]


class Quantised(torch.Tensor):
    """A tensor class of another library, as torchao's are."""


class Foreign(torch.optim.AdamW):
    """Keeps one more entry of state, of a kind that no rule knows, in the parameter's shape."""

    def __init__(self, params: Any, entry: Any) -> None:
        super().__init__(params)
        self.entry = entry

    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter].setdefault(*self.entry(self.state[parameter], parameter))


ENTRIES = {
    "galore's projector": lambda state, p: ("projector", object()),
    "schedule-free's weights": lambda state, p: ("z", p.detach().clone()),
    "a quantised moment": lambda state, p: ("max_exp_avg_sq", torch.zeros_like(p).as_subclass(Quantised)),
    "a compensation": lambda state, p: ("compensation", torch.zeros_like(p)),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("family", [LRU, MAMBA], ids=family_id)
def test_state_of_other_libraries_is_reset_and_never_mapped_by_chance(family: Family, entry: str) -> None:
    model = family.build()
    optimizer = Foreign(model.parameters(), ENTRIES[entry])
    train_step(model, optimizer, family.batch())
    old = {id(p) for p in model.parameters()}
    assert compress(model, CompreSSMConfig(fraction=0.5), family.calibration(), optimizer).changed
    assert all(bool(optimizer.state.get(p)) is (id(p) in old) for p in model.parameters())
    assert misfit(optimizer) == ""
    train_step(model, optimizer, family.batch())


def test_moments_in_a_projection_do_not_count_as_a_misfit() -> None:
    model = LRU.build()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, LRU.batch())
    state = optimizer.state[next(model.parameters())]
    state["exp_avg"] = state["exp_avg"][:1]
    assert "exp_avg" in misfit(optimizer)
    state["projector"] = object()
    assert misfit(optimizer) == ""


@pytest.mark.parametrize(
    ("family", "settings"), [(LRU, {}), (MAMBA, {}), (MAMBA2, {"compat": "best"})], ids=["lru", "mamba", "mamba2 best"]
)
@pytest.mark.parametrize("policy", ["carry", "reset"])
def test_adagrad_goes_on_where_it_has_to_begin_anew(family: Family, settings: Any, policy: str) -> None:
    model = family.build()
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.1)
    train_step(model, optimizer, family.batch())
    config = CompreSSMConfig(fraction=0.5, optimizer_state=policy, **settings)
    assert compress(model, config, family.calibration(), optimizer).changed
    assert all(optimizer.state[p]["sum"].shape == p.shape for p in model.parameters())
    train_step(model, optimizer, family.batch())
    reset(optimizer)
    assert all(bool((optimizer.state[p]["sum"] == torch.tensor(0.1)).all()) for p in model.parameters())
    train_step(model, optimizer, family.batch())


class Lomo(torch.optim.SGD):
    """Stands for the class of that name, which keeps moments by name and steps in hooks."""

    __module__ = "lomo_optim.lomo"


REFUSED = {
    "galore_adamw for galore_adamw_layerwise": lambda model: LayerWiseDummyOptimizer({}, lr=1e-3),
    "Lomo keeps": lambda model: Lomo(model.parameters(), lr=1e-3),
    "LBFGS keeps": lambda model: torch.optim.LBFGS(model.parameters()),
    "does not have, the first of shape": lambda model: torch.optim.AdamW([nn.Parameter(torch.zeros(2))]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_optimizers_that_no_cut_can_follow_are_refused_before_the_first_step(reason: str, tmp_path: Path) -> None:
    model = LRU.build()
    optimizer = REFUSED[reason](model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = trainer_of(LRU, tmp_path, SETTINGS, model, optimizers=(optimizer, scheduler), max_steps=20)
    with pytest.raises(ValueError, match=reason):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match=reason):
        compress(model, CompreSSMConfig(fraction=0.5), LRU.calibration(), optimizer)


class EMACallback(TrainerCallback):
    """What people call theirs."""


class Averaging(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average = AveragedModel(kwargs["model"])


class Holding(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = dict(kwargs["model"].named_parameters())


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (EMACallback, "EMACallback averages"),
        (Averaging, r"Averaging\.average holds"),
        (Holding, r"Holding\.seen holds.*by name"),
        (lambda: pytest.importorskip("trl").BEMACallback(), "BEMACallback averages"),
    ],
    ids=["by name", "averaged model", "parameters", "trl"],
)
def test_callbacks_that_keep_old_parameters_are_refused(callback: Any, match: str, tmp_path: Path) -> None:
    trainer = trainer_of(LRU, tmp_path, SETTINGS, callbacks=[callback()], max_steps=20)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
