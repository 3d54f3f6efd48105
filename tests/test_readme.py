"""Every Python block of the README runs, in order and in one namespace, word for word."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_compressm.scans import disable_fast_selective_scan
from tests.docs.pages import blocks
from tests.docs.reader import at_hand


README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = blocks(README, "python")
PUSHED = "pushed"
PLAIN_TRANSFORMERS = """
import json, sys
sys.modules["hf_compressm"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
print(json.dumps([type(model).__name__, model.config.state_size, tuple(tokens.shape)]))
"""


@pytest.fixture(autouse=True)
def stock_scan():
    yield
    disable_fast_selective_scan()


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README's reader has at hand: data, arguments, and the model under its Hub id (here a local folder)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda trainer: trainer.save_model(PUSHED))
    found = at_hand(save_strategy="no")
    del found["model"]  # the first block loads it
    return found


def test_the_blocks_run_in_order(names: dict[str, Any], tmp_path: Path) -> None:
    before, *others = BLOCKS
    exec(compile(before, "README.md", "exec"), names)
    model, trainer = names["model"], names["trainer"]
    assert model.config.state_size < 16
    assert [cut["step"] for cut in model.config.compressm["cuts"]] == [1, 2, 3, 4]
    held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    names["optimizer"] = trainer.optimizer
    size = model.config.state_size

    command = [sys.executable, "-c", PLAIN_TRANSFORMERS, str(tmp_path / PUSHED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ["MambaForCausalLM", size, [1, 7]]

    for block in others:
        exec(compile(block, "README.md", "exec"), names)
    assert model.config.state_size == size // 2
    assert set(names["result"].state_sizes_after.values()) == {size // 2}
