"""Wrong declarations are refused with the law that they break, and nothing of the model changes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, Layout, compress, declare_layer, rows, states
from hf_compressm.families import registry
from hf_compressm.families.laws import LayoutError
from hf_compressm.families.layout import Part
from hf_compressm.scans import selective_scan as selective_scan_fn
from tests.blocks import Mamba2, OffsetVim
from tests.family_table import same


PARTS = (
    states("A_log"),
    rows("x_proj", "*", "B", "C", folds=True),
    states("A_b_log", group=1),
    rows("x_proj_b", "*", "B", "C", folds=True, group=1),
)
LAYOUT = Layout(state_size="d_state", parts=PARTS)


class Biased(OffsetVim):
    """A block with further tensors of the state's width."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__(d_model, d_state)
        self.B_bias, self.B_bias_b = nn.Parameter(torch.randn(d_state, 1)), nn.Parameter(torch.randn(d_state, 1))

    def direction(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        step, B, C = getattr(self, f"x_proj{ending}")(x.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        step = F.softplus(getattr(self, f"dt_proj{ending}")(step)).mT
        A = -getattr(self, decay).exp()
        return selective_scan_fn(x, step, A, B.mT + getattr(self, f"B_bias{ending}"), C.mT, z=z)


class Remembering(OffsetVim):
    """A block with an attribute that depends on the state size."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__(d_model, d_state)
        self.widths = [self.dt_rank, d_state, d_state]

    def direction(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        step, B, C = getattr(self, f"x_proj{ending}")(x.mT).split(self.widths, dim=-1)
        step = F.softplus(getattr(self, f"dt_proj{ending}")(step)).mT
        return selective_scan_fn(x, step, -getattr(self, decay).exp(), B.mT, C.mT, z=z)


class Normed(OffsetVim):
    """A block whose C is normalised before the recurrence."""

    def direction(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        widths = [self.dt_rank, self.d_state, self.d_state]
        step, B, C = getattr(self, f"x_proj{ending}")(x.mT).split(widths, dim=-1)
        step = F.softplus(getattr(self, f"dt_proj{ending}")(step)).mT
        A = -getattr(self, decay).exp()
        return selective_scan_fn(x, step, A, B.mT, F.silu(C.mT), z=z)


class WithoutRecurrence(OffsetVim):
    """A block that computes its recurrence itself."""

    def direction(self, xz: Tensor, ending: str, decay: str) -> Tensor:
        return xz.chunk(2, dim=1)[0].cumsum(-1)


def with_parts(*parts: Part) -> Layout:
    return replace(LAYOUT, parts=parts)


Block = Callable[[int, int], nn.Module]
A, X, A_B, X_B = PARTS
WRONG: dict[str, tuple[Block, Layout, str]] = {
    "a part that is not there": (OffsetVim, with_parts(states("A"), *PARTS[1:]), "parts: OffsetVim has no 'A'"),
    "another axis": (OffsetVim, with_parts(states("A_log", 0), *PARTS[1:]), "parts: A_log has shape .* axis 0 holds"),
    "an attribute that is not N": (OffsetVim, replace(LAYOUT, state_size="dt_rank"), "recurrence: it has 4 states"),
    "an attribute that is no number": (OffsetVim, replace(LAYOUT, state_size="act"), "parts: OffsetVim.act is SiLU"),
    "an output that is none": (OffsetVim, replace(LAYOUT, output="act"), "parts: its output 'act' is no projection"),
    "an output before the recurrence": (OffsetVim, replace(LAYOUT, output="in_proj"), "recurrence: in_proj does not"),
    "no recurrence": (WithoutRecurrence, LAYOUT, "recurrence: its forward calls no known recurrence"),
    "B and C exchanged": (
        OffsetVim,
        with_parts(A, rows("x_proj", "*", "C", "B", folds=True), A_B, X_B),
        "rows: the rows of B of group 0 change the C of call 1",
    ),
    "the rest at the end": (
        OffsetVim,
        with_parts(A, rows("x_proj", "B", "C", "*", folds=True), A_B, X_B),
        "rows: the rows of B of group 0 change the delta",
    ),
    "two rests": (OffsetVim, with_parts(A, rows("x_proj", "*", "B", "*", "C"), A_B, X_B), "parts: .*two rests"),
    "one direction": (OffsetVim, with_parts(A, X), "rows: the rows of B of group 0 do not change the B of call 2"),
    "directions exchanged": (
        OffsetVim,
        with_parts(*(replace(part, group=1) for part in (A, X)), *(replace(part, group=0) for part in (A_B, X_B))),
        "rows: the rows of B of group 0 do not change the B of call 1, group 0",
    ),
    "the decay of one direction left out": (
        OffsetVim,
        with_parts(A, X, X_B),
        "rows: the states of group 1 do not change the A",
    ),
    "the bias left out": (
        OffsetVim,
        with_parts(A, rows("x_proj.weight", "*", "B", "C", folds=True), A_B, X_B),
        "folding: twice the rows of C",
    ),
    "an activation after the rows": (Normed, LAYOUT, "folding: twice the rows of C"),
    "a tensor left out": (
        Biased,
        LAYOUT,
        "order: its output is another one .*; B_bias, B_bias_b may have a state axis",
    ),
    "an attribute left out": (Remembering, LAYOUT, "smaller: it does not run with 3 states: RuntimeError: split"),
    "too many groups": (OffsetVim, replace(LAYOUT, groups=3), r"recurrence: its calls have 2 group\(s\)"),
}


@pytest.fixture
def registered() -> Any:
    """The declarations of a test are those of the test alone."""
    before = dict(registry._FAMILIES)
    yield
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_refused_with_its_law(name: str) -> None:
    block, layout, reason = WRONG[name]
    torch.manual_seed(0)
    layer = block(8, 4)
    before = copy.deepcopy(layer)
    with pytest.raises(LayoutError, match=f"declared for {type(layer).__name__} breaks the law of {reason}"):
        declare_layer(type(layer), layout, example=(layer, torch.randn(2, 9, 8)))
    assert same(layer.state_dict(), before.state_dict())
    assert vars(layer).keys() == vars(before).keys()
    with pytest.raises(ValueError, match="no SSM layer of a known family"):
        registry.find_layers(layer)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", WRONG)
def test_without_an_example_the_first_batch_is_the_example(name: str) -> None:
    block, layout, reason = WRONG[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), block(8, 4))
    declare_layer(type(model[1]), layout)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"{reason.partition(': ')[2]}|layout"):
        compress(model, CompreSSMConfig(fraction=0.5), [torch.randn(2, 9, 8)])
    assert same(model.state_dict(), before.state_dict())


@pytest.mark.usefixtures("registered")
def test_what_lies_between_can_be_declared_too() -> None:
    """The forgotten tensor and attribute, named; the activation, without folding."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 9, 8)
    named = replace(LAYOUT, follows={"widths": lambda layer, size: [layer.dt_rank, size, size]})
    declare_layer(Remembering, named, example=(Remembering(8, 4), inputs))
    declare_layer(OffsetVim, LAYOUT, example=(OffsetVim(8, 4), inputs))
    biases = rows("B_bias", "B", folds=True), rows("B_bias_b", "B", folds=True, group=1)
    declare_layer(Biased, with_parts(*PARTS, *biases), example=(Biased(8, 4), inputs))
    unfolded = tuple(replace(part, folds=False) for part in PARTS)
    declare_layer(Normed, replace(LAYOUT, parts=unfolded), example=(Normed(8, 4), inputs))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("ngroups", [1, 2])
def test_the_layout_of_mamba2_keeps_the_laws(ngroups: int) -> None:
    layout = replace(registry.registered("mamba_ssm.modules.mamba2.Mamba2").layout, others=())
    torch.manual_seed(0)
    block = Mamba2(16, d_state=8, headdim=8, ngroups=ngroups, use_mem_eff_path=False)
    declare_layer(Mamba2, layout, example=(block, torch.randn(2, 9, 16)))
    swapped = (rows("in_proj", "*", "C", "B", "nheads"), layout.parts[1])
    with pytest.raises(LayoutError, match="law of rows"):
        declare_layer(Mamba2, replace(layout, parts=swapped), example=(block, torch.randn(2, 9, 16)))
