"""The benchmark of quantised states reads text as the model does, rounds as engines do, and prints its table."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.family_table import MAMBA2, token_batch


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "quantised_state.py"
ROUND_OFF = 1e-5
"""Between the loss of one pass and that of as many steps, in float32."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    paths = list(sys.path)
    spec = importlib.util.spec_from_file_location("quantised_state", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = paths
    return module


def test_token_by_token_the_loss_is_that_of_one_pass(script: ModuleType) -> None:
    model = MAMBA2.build().eval()
    tokens = token_batch(3, 12)["input_ids"]
    with torch.no_grad():
        whole = float(model(tokens, labels=tokens).loss)
    assert script.decoded_loss(model, tokens, script.ROUNDINGS["float32"]) == pytest.approx(whole, abs=ROUND_OFF)


def test_the_rounded_state_is_the_one_that_is_read_next(script: ModuleType) -> None:
    model = MAMBA2.build().eval()
    tokens = token_batch(3, 12)["input_ids"]
    losses = {
        forget: script.decoded_loss(model, tokens, lambda state, kept=1.0 - forget: kept * state) for forget in (0, 1)
    }
    assert abs(losses[0] - losses[1]) > 100 * ROUND_OFF


@pytest.mark.parametrize(("bits", "last"), [(8, 127), (4, 7)])
def test_whole_numbers_of_a_scale_for_each_row(script: ModuleType, bits: int, last: int) -> None:
    state = torch.randn(2, 3, 5, 16, dtype=torch.float64) * torch.logspace(-6, 6, 5, dtype=torch.float64)[:, None]
    found = script.rounded(state, bits, script.ROW)
    scale = state.abs().amax(-1, keepdim=True) / last
    whole = found / scale
    assert torch.allclose(whole, whole.round(), atol=1e-9)
    assert bool(((found - state).abs() <= 0.5 * scale * (1 + 1e-9)).all())
    by_head = script.rounded(state, bits, script.HEAD)
    assert bool((by_head[..., 0, :] == 0).all())  # a quiet row beside a loud one
    assert torch.equal(script.rounded(torch.zeros(1, 1, 2, 4), bits, script.ROW), torch.zeros(1, 1, 2, 4))


@pytest.mark.slow
def test_the_table_is_printed() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--smoke"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["states", "128", "64", "32"]
    sizes = [[int(cell.replace(",", "")) for cell in row[1:3]] for row in rows[1:]]
    assert [full for full, _ in sizes] == [sizes[0][0], sizes[0][0] // 2, sizes[0][0] // 4]
    assert all(eight * 4 > full for full, eight in sizes)  # the scales
