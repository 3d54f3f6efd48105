"""Plans and cuts are the same, and can be trained, whichever modes of torch their caller has switched on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compressm import analyze, apply_plan, compress, compress_checkpoint
from hf_compressm.utils.modes import outside_inference, plain_modes
from tests.family_table import LAYOUTS, LRU, MAMBA, S5, Family, family_id, same, train_step


HALF = {"fraction": 0.5}
Mode = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.9 reads the None that it left there


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Mode] = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default device": lambda: default_device("meta"),
    "device in a block": lambda: torch.device("meta"),
    "double precision": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
}


def everything(family: Family, mode: Mode) -> tuple[Any, list[Any]]:
    """A model that was planned for and cut under a mode, with its optimizer's state, and trained on without it."""
    model = family.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, optimizer, family.batch(seed=3))
    calibration = family.calibration()
    with mode():
        plan = analyze(model.eval(), HALF, calibration)
        result = compress(model, HALF, calibration, optimizer)
    assert result.changed
    spectra = [layer.hankel_singular_values for layer in plan.layers]
    train_step(model, optimizer, family.batch(seed=5))
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers(), *moments))
    assert all(parameter.requires_grad for parameter in model.parameters())
    return model, [spectra, model.state_dict(), moments]


@pytest.mark.parametrize(
    "family",
    [family if family in (MAMBA, S5, LRU) else pytest.param(family, marks=pytest.mark.slow) for family in LAYOUTS],
    ids=family_id,
)
def test_a_cut_is_the_same_in_every_mode(family: Family) -> None:
    _, expected = everything(family, torch.enable_grad)
    for name, mode in MODES.items():
        assert same(everything(family, mode)[1], expected), name


@pytest.mark.parametrize("family", [S5, LRU], ids=family_id)
def test_closed_forms_do_not_depend_on_autocast(family: Family) -> None:
    expected, model = family.build(), family.build()
    compress(expected, {**HALF, "criterion": "hankel"})
    with torch.autocast("cpu", torch.bfloat16):
        compress(model, {**HALF, "criterion": "hankel"})
    assert same(model.state_dict(), expected.state_dict())


def test_a_plan_made_in_inference_mode_is_applied_outside_of_it() -> None:
    model = MAMBA.build()
    with torch.inference_mode():
        plan = analyze(model, HALF, MAMBA.calibration())
    apply_plan(model, plan)
    train_step(model, torch.optim.SGD(model.parameters(), 0.1), MAMBA.batch())


@pytest.mark.parametrize("mode", ["inference", "default device", "device in a block"])
def test_a_checkpoint_is_cut_in_every_mode(mode: str, tmp_path: Path) -> None:
    LRU.build().save_pretrained(tmp_path / "model")
    with MODES[mode]():
        result = compress_checkpoint(tmp_path / "model", tmp_path / "cut", HALF)
    assert set(result.state_sizes_after.values()) == {4}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_the_modes_of_the_caller_come_back(mode: Mode) -> None:
    def now() -> tuple[bool, bool, torch.device]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.empty(0).device

    with mode():
        before = now()
        with outside_inference():
            assert now() == (False, before[1], before[2])
        with suppress(KeyError), plain_modes():
            assert now() == (False, before[1], torch.device("cpu"))
            raise KeyError
        assert now() == before
