"""The benchmark of layouts runs, and what is said of their cuts holds on briefly trained models."""

import argparse
import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan


NOISE = 2e-4
"""Added losses below this are not told apart on four held-out batches."""
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "compare_layouts.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    paths = list(sys.path)
    spec = importlib.util.spec_from_file_location("compare_layouts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = paths
    return module


@pytest.fixture(autouse=True)
def fast_scan():
    enable_fast_selective_scan()
    yield
    disable_fast_selective_scan()


@pytest.mark.parametrize(
    "layout",
    ["mamba", "mamba2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon_mamba", "jamba", "zamba"))],
)
def test_the_table_is_printed(
    script: ModuleType, layout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "compare_speed", lambda *args: None)
    args = argparse.Namespace(seed=0, steps=1, more_steps=0, learning_rate=1e-3)
    tokens = torch.arange(2000) % 256
    batch = script.cut_text(tokens, 2, length=16)
    script.compare(layout, args, lambda: batch, [batch])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| kept of 64 | random | energy | chosen")
    assert [row.split()[1] for row in rows[2:]] == ["32", "16", "8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "better", "worse"),
    [
        ("mamba", "chosen", "energy"),
        ("falcon_mamba", "chosen", "energy"),
        ("mamba2", "chosen, best", "chosen"),
    ],
)
def test_repair_and_projection_add_at_most_half(script: ModuleType, layout: str, better: str, worse: str) -> None:
    torch.manual_seed(0)
    tokens = script.read_tokens(None)[:2_000_000]
    held_out = [script.cut_text(tokens[1_800_000:], 16, generator=torch.Generator().manual_seed(1)) for _ in range(4)]

    def batch() -> dict[str, torch.Tensor]:
        return script.cut_text(tokens[:1_800_000], 16, length=128)

    model = script.build(layout)
    script.train(model, batch, 150, 2e-3)
    before = script.evaluate(model, held_out)
    ways = script.cutters(layout, [batch() for _ in range(4)])
    for size in (32, 16, 8):
        added = {}
        for name in (better, worse):
            smaller = copy.deepcopy(model)
            ways[name](smaller, size)
            added[name] = script.evaluate(smaller, held_out) - before
        assert added[better] <= added[worse] / 2 + NOISE, (size, added)
