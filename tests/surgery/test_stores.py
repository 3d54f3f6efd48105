"""Optimizers inside of optimizers: a cut writes where parameters and state are stored, and reads it back."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.surgery import Snapshot
from tests.family_table import LRU, MAMBA, MAMBA2, Family, family_id, same, snapshot, ssm_layers, train_step
from tests.trainers import callback_of, trainer_of


class Shown(torch.optim.Optimizer):
    """A wrapper without groups and state of its own: it computes both from the optimizers inside of it."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.held: Any = inner
        self.defaults: dict[str, Any] = {}
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}

    @property
    def inner(self) -> Any:
        return self.held

    @property
    def param_groups(self) -> Any:
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    @property
    def state(self) -> Any:
        return {parameter: state for optimizer in self.inner for parameter, state in optimizer.state.items()}

    def step(self, closure: Any = None) -> None:
        for optimizer in self.inner:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.inner:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return {"inner": [optimizer.state_dict() for optimizer in self.inner]}

    def load_state_dict(self, state_dict: Any) -> None:
        for optimizer, state in zip(self.inner, state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)


class Named(Shown):
    """The same, with the optimizers in a dict."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        super().__init__()
        self.held = {f"number {number}": optimizer for number, optimizer in enumerate(inner)}

    @property
    def inner(self) -> Any:
        return self.held.values()


class Lookahead(torch.optim.Optimizer):
    """Shares the groups of the optimizer inside of it, and has state of its own beside it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


class Container:
    """No torch optimizer at all."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = list(inner)

    def step(self) -> None:
        for optimizer in self.inner:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.inner:
            optimizer.zero_grad()


def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    held = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in held]
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "properties": lambda model: Shown(*halves(model)),
    "a dict": lambda model: Named(*halves(model)),
    "nested": lambda model: Shown(Named(*halves(model))),
    "no optimizer": lambda model: Container(*halves(model)),
}


def leaves_of(optimizer: Any) -> list[torch.optim.Optimizer]:
    inner = getattr(optimizer, "inner", ())
    return [leaf for one in inner for leaf in leaves_of(one)] if inner else [optimizer]


@pytest.mark.parametrize("family", [MAMBA, MAMBA2, LRU], ids=family_id)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_carried_over_as_the_optimizers_inside_of_it_are(family: Family, kind: str) -> None:
    model, plain = family.build(), family.build()
    optimizer, leaves = WRAPPERS[kind](model), halves(plain)
    for one, trainer in ((model, optimizer), (plain, Container(*leaves))):
        train_step(one, trainer, family.batch())
        compress(one, CompreSSMConfig(fraction=0.5), family.calibration(), trainer)
    own = {id(parameter) for parameter in model.parameters()}
    for wrapped, leaf in zip(leaves_of(optimizer), leaves, strict=True):
        assert {id(parameter) for parameter in wrapped.state} <= own
        assert same(wrapped.state_dict(), leaf.state_dict())
    carried = leaves_of(optimizer)[0].state
    cut = [p for layer in ssm_layers(model).values() for p in layer.parameters() if p in carried]
    assert cut
    assert all(bool(carried[parameter]["momentum_buffer"].any()) for parameter in cut)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_step(model, optimizer, family.batch(seed=1))
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_list_of_optimizers_is_carried_over() -> None:
    model = MAMBA.build()
    optimizers = halves(model)
    train_step(model, Container(*optimizers), MAMBA.batch())
    compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration(), optimizers)
    decay = next(iter(ssm_layers(model).values())).A_log
    assert optimizers[0].state[decay]["momentum_buffer"].shape == decay.shape


@pytest.mark.filterwarnings("ignore")
def test_state_beside_that_of_the_inner_optimizer_is_reset_and_that_of_the_inner_one_carried() -> None:
    model = MAMBA.build()
    optimizer = Lookahead(torch.optim.AdamW(model.parameters()))
    train_step(model, optimizer, MAMBA.batch())
    compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration(), optimizer)
    decay = next(iter(ssm_layers(model).values())).A_log
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in [*optimizer.state, *optimizer.inner.state]} <= own
    assert optimizer.inner.state[decay]["exp_avg"].shape == decay.shape
    train_step(model, optimizer, MAMBA.batch(seed=1))
    assert optimizer.state[decay]["slow"].shape == decay.shape


def test_a_snapshot_puts_every_inner_optimizer_back() -> None:
    model = MAMBA.build()
    optimizer = Shown(*halves(model))
    train_step(model, optimizer, MAMBA.batch())
    before, state = snapshot(model), copy.deepcopy([leaf.state_dict() for leaf in optimizer.inner])
    saved = Snapshot(model, optimizer)
    compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration(), optimizer)
    saved.restore()
    assert same(snapshot(model), before)
    assert same([leaf.state_dict() for leaf in optimizer.inner], state)
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


def test_a_run_with_a_wrapper_cuts(tmp_path: Path) -> None:
    model = MAMBA.build()
    optimizer = Shown(*halves(model))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = trainer_of(MAMBA, tmp_path, model=model, optimizers=(optimizer, scheduler))
    trainer.train()
    assert callback_of(trainer).events[-1].outcome == "cut"
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


class Frozen(Shown):
    """Shows groups and state as they were when they were read first, from where nobody can find them."""

    seen: ClassVar = WeakKeyDictionary()

    @property
    def param_groups(self) -> Any:
        return self.seen.setdefault(self, [dict(group) for group in super().param_groups])


class Dropping(Shown):
    """Forgets the state of the parameters that it did not begin with."""

    first: ClassVar = WeakKeyDictionary()

    @property
    def state(self) -> Any:
        known = self.first.setdefault(self, {id(group) for o in self.inner for group in o.state})
        return {parameter: state for parameter, state in super().state.items() if id(parameter) in known}


@pytest.mark.parametrize(
    ("kind", "match"), [(Frozen, "the new parameters"), (Dropping, "the state of new parameters")]
)
def test_an_optimizer_that_does_not_show_what_it_was_given_takes_the_cut_back(kind: Any, match: str) -> None:
    model = MAMBA.build()
    optimizer = kind(*halves(model))
    train_step(model, optimizer, MAMBA.batch())
    before, state = snapshot(model), copy.deepcopy([leaf.state_dict() for leaf in optimizer.inner])
    with pytest.raises(ValueError, match=rf"{kind.__name__} does not show {match}.*as it was before"):
        compress(model, CompreSSMConfig(fraction=0.5), MAMBA.calibration(), optimizer)
    assert same(snapshot(model), before)
    assert same([leaf.state_dict() for leaf in optimizer.inner], state)


class Detached(Shown):
    """Its parameters are in lists of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.matrices = [
            [p for p in model.parameters() if p.dim() > 1],
            [p for p in model.parameters() if p.dim() < 2],
        ]

    @property
    def param_groups(self) -> Any:
        return [{"params": list(parameters), "lr": 1e-3} for parameters in self.matrices]


class Hidden(Shown):
    """Groups that it computes from a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def param_groups(self) -> Any:
        return [{"params": list(self.model.parameters()), "lr": 1e-3}]


class WithList(torch.optim.SGD):
    """A second list, as clipping or an average of one's own needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=1e-3)
        self.clipped = {"all": list(model.parameters())}


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Detached, "parameters in matrices"),
        (Hidden, "parameters in param_groups or state that it computes anew"),
        (WithList, "parameters in clipped"),
    ],
)
def test_an_optimizer_that_cannot_be_given_new_parameters_is_refused_before_the_first_step(
    kind: Any, match: str, tmp_path: Path
) -> None:
    model = LRU.build()
    optimizer = kind(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters()), lambda _: 1.0)
    trainer = trainer_of(LRU, tmp_path, model=model, optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match=rf"{kind.__name__} holds {match}.*hf_compressm\.compress"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match=match):
        compress(model, CompreSSMConfig(fraction=0.5), LRU.calibration(), optimizer)
