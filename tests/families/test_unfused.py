"""The parts of fused functions give what the fused functions give, and show the recurrence."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compressm.families import unfused
from hf_compressm.families.recurrences import replaced
from hf_compressm.scans import selective_scan, ssd_scan
from tests.blocks import fused
from tests.families import ready


CLOSE = 1e-6
"""Relative; float64 in another order."""


def combined(heads: int = 4, head_dim: int = 3, groups: int = 2, N: int = 5, mlp: int = 0) -> dict[str, Any]:
    """Arguments of the fused function of Mamba-2."""
    width, convolved = heads * head_dim, heads * head_dim + 2 * groups * N
    given = {
        "zxbcdt": torch.randn(2, 11, 2 * mlp + width + convolved + heads),
        "conv1d_weight": torch.randn(convolved, 4),
        "conv1d_bias": torch.randn(convolved),
        "dt_bias": torch.randn(heads),
        "A": -torch.rand(heads),
        "D": torch.randn(heads),
        "outproj_weight": torch.randn(7, mlp + width),
        "outproj_bias": torch.randn(7),
    }
    return {name: value.double() for name, value in given.items()} | {
        "chunk_size": 4,
        "headdim": head_dim,
        "ngroups": groups,
    }


def heard(signal: Tensor, weight: Tensor) -> Tensor:
    return signal


run = partial(unfused.mamba_split_conv1d_scan_combined, ssd_scan, heard)
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "gate in the scan": dict,
    "norm after the gate": lambda: {
        "rmsnorm_weight": torch.randn(12).double(),
        "rmsnorm_eps": 1e-5,
        "norm_before_gate": False,
    },
    "norm before the gate": lambda: {"rmsnorm_weight": torch.randn(12).double()},
    "D by channel": lambda: {"D": torch.randn(4, 3).double(), "headdim": None},
    "first states and limits": lambda: {
        "initial_states": torch.randn(2, 4, 3, 5).double(),
        "dt_limit": (0.1, 0.5),
    },
    "no projection": lambda: {"outproj_weight": None, "outproj_bias": None},
    "no biases": lambda: {"conv1d_bias": None, "outproj_bias": None},
}


@pytest.mark.parametrize("mlp", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_mamba2_give_what_it_gives(case: str, mlp: int) -> None:
    given = combined(mlp=mlp)
    given |= CASES[case]()
    expected = fused.mamba_split_conv1d_scan_combined(**given)
    found = run(*list(given.values())[:3], **dict(list(given.items())[3:]))
    assert found.shape == expected.shape
    assert (found - expected).norm() <= CLOSE * expected.norm()


def test_texts_of_one_row_do_not_reach_into_each_other() -> None:
    """The convolution, too, starts anew."""
    given = combined()
    seq_idx = torch.tensor([0] * 5 + [1] * 2 + [2] * 4)
    together = run(**given, seq_idx=seq_idx.expand(2, -1))
    whole = given["zxbcdt"]
    apart = [run(**{**given, "zxbcdt": whole[:, seq_idx == number]}) for number in range(3)]
    assert (together - torch.cat(apart, dim=1)).norm() <= CLOSE * together.norm()
    assert (together - run(**given)).norm() > 0.01 * together.norm()


def test_the_last_state_is_passed_on() -> None:
    given = combined()
    out, last = run(**given, return_final_states=True)
    assert torch.equal(out, run(**given))
    assert last.shape == (2, 4, 3, 5)


@pytest.mark.parametrize("name", ["vim", "mamba", "mamba2", "mamba2simple with a first state"])
def test_a_fused_function_is_not_run_while_a_layer_is_watched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hide the output projection, and kernels would hide the recurrence."""
    seen: list[str] = []
    for function in ("selective_scan", "ssd_scan"):
        whole = getattr(fused, function)
        monkeypatch.setattr(
            fused, function, lambda *args, whole=whole, **kwargs: seen.append("") or whole(*args, **kwargs)
        )
    model = ready.built(ready.READY[name])
    data = ready.batch(model)
    model(**data)
    assert seen
    seen.clear()
    with ready.as_installed(), replaced(model, lambda kind, function: function, heard):
        model(**data)
    assert not seen


def test_norms_inside_of_a_fused_mamba_are_refused() -> None:
    with pytest.raises(ValueError, match="b_rms_weight"):
        unfused.mamba_inner_fn_no_out_proj(selective_scan, torch.zeros(1, 2, 3), b_rms_weight=torch.ones(4))
