"""Every Python block of the pages runs, word for word, in order, with one namespace for each page."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaForCausalLM, Trainer

from hf_compressm.scans import disable_fast_selective_scan
from tests import tools
from tests.docs.pages import PAGES, blocks
from tests.docs.reader import at_hand


@pytest.fixture(autouse=True)
def stock_scan():
    yield
    disable_fast_selective_scan()


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages' reader has at hand: a model, also under its Hub id (here a local folder), data and arguments."""
    monkeypatch.chdir(tmp_path)
    return at_hand(save_steps=20)


def run(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


def at_the_end_of(name: str) -> Any:
    """Marks a function that looks at what a page's blocks have left."""

    def decorate(look: Any) -> Any:
        LOOKS[name] = look
        return look

    return decorate


LOOKS: dict[str, Any] = {}
IN_DEFAULT_RUN = ("loops", "quickstart", "recipes", "resuming", "reports_and_hub")
EXPORTING = "export"
"""The page that takes long, and needs more than the test extra."""


def in_its_time(page: Path) -> Any:
    """A page as a parameter, marked slow if it is."""
    return pytest.param(page, id=page.stem, marks=[] if page.stem in IN_DEFAULT_RUN else [pytest.mark.slow])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("page", [in_its_time(page) for page in PAGES if blocks(page, "python")])
def test_the_blocks_run_in_order(page, names):
    if page.stem == EXPORTING:
        tools.module("torchao")
    names = run(page, names)
    if page.stem in LOOKS:
        LOOKS[page.stem](names)


def test_every_look_has_its_page():
    assert set(LOOKS) <= {page.stem for page in PAGES}


@at_the_end_of("quickstart")
def _(names: dict[str, Any]) -> None:
    assert [event.step for event in names["callback"].events] == [15, 30]
    assert type(names["again"]) is MambaForCausalLM
    assert names["again"].config.state_size == names["model"].config.state_size < 32


@at_the_end_of("choosing_a_tolerance")
def _(names: dict[str, Any]) -> None:
    assert names["model"].config.state_size == 32
    assert names["candidate"].config.state_size == max(names["result"].state_sizes_after.values()) < 32
    assert [layer.status for layer in names["plan"].layers] == ["cut", "cut"]


@at_the_end_of("distributed")
def _(names: dict[str, Any]) -> None:
    assert names["model"].config.state_size == 8
    assert Path("smaller/checkpoint-40/compressm.complete").exists()


@at_the_end_of("peft")
def _(names: dict[str, Any]) -> None:
    assert names["again"].config.state_size == 8
    tokens = torch.randint(1, 64, (2, 16))
    logits = names["adapted"].eval()(tokens).logits
    assert torch.allclose(names["again"].eval()(tokens).logits, logits, atol=1e-5)  # float32 through a file


@at_the_end_of("models")
def _(names: dict[str, Any]) -> None:
    assert names["logits"].shape == (2, 10)
    assert names["mamba2"].config.state_size == 8


@at_the_end_of("resuming")
def _(names: dict[str, Any]) -> None:
    assert names["guarded"].recovery_steps == 200
    assert (Path("run") / "checkpoint-40" / "compressm.complete").exists()
    assert names["model"].config.state_size == 8


@at_the_end_of("loops")
def _(names: dict[str, Any]) -> None:
    assert [event.step for event in names["compressor"].events] == [3, 6]  # halved by accumulation
    assert names["tagger"].body.config.state_size == names["again"].body.config.state_size == 16
    assert Path("state/compressor_0.pt").exists()


@at_the_end_of("recipes")
def _(names: dict[str, Any]) -> None:
    held = {id(parameter) for group in names["optimizer"].param_groups for parameter in group["params"]}
    assert isinstance(names["trainer"], Trainer)
    assert names["model"].config.state_size == 16
    assert held == {id(parameter) for parameter in names["model"].parameters()}
    assert set(names["best"].hyperparameters) == {"tolerance", "learning_rate"}
