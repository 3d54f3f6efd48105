"""The session on a GPU: at toy sizes on the CPU it measures, resumes, keeps its time, and goes on after a failure."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hf_compressm.scans import selective_scan


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "gpu.py"
MACHINE = {"card": "none"}
WAYS = ("triton", "mamba-ssm", "torch")
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
PATIENCE = 60
"""Seconds for a process to start on a busy machine."""


def session_of(part: Any, tmp_path: Path, budget: float = 300.0, **machine: str) -> Any:
    results = part("rows").Results(tmp_path, "gpu.jsonl")
    return part("gpu_session.session").Session(
        results, MACHINE | machine, part("gpu_session.scale").toy("cpu"), budget
    )


def figure(part: Any, section: str, measure: Any, needs: float = 20.0) -> Any:
    return part("gpu_session.session").Figure(section, "torch", 2, measure, needs, "torch")


@pytest.mark.slow
def test_a_session_measures_every_section_and_measures_nothing_twice(tmp_path: Path) -> None:
    results = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(SCRIPT), "--smoke", "--device", "cpu", "--results", str(results)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert first.returncode == 0, first.stderr[-3000:]
    *_, table = first.stdout.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    assert {(work, way) for work, way, *_ in rows} == {
        ("Triton's cache", "-"),
        *((f"scan against float64, {dtype}", way) for dtype in ("float32", "bfloat16") for way in WAYS),
        *(("scan", way) for way in WAYS),
        *(("step of a Mamba-1", way) for way in (*WAYS, "triton, compiled")),
        *(("step of a Mamba-2", way) for way in ("mamba-ssm", "torch")),
        *(("step of an LRU", way) for way in ("triton", "torch")),
        *(("Trainer, 9 steps, a cut to 2", way) for way in ("without the callback", "with the callback")),
    }
    assert not [row for row in rows if "failed:" in row[6] or "not measured" in row[6]]
    measured = [row for row in rows if row[1] not in ("triton", "mamba-ssm", "triton, compiled")]
    assert all(row[3] != "-" or "largest error" in row[6] for row in measured)
    (cut,) = [row[6] for row in rows if row[1] == "with the callback"]
    assert "with the torch scan" in cut
    assert "s for the cut" in cut
    assert (tmp_path / "gpu.md").read_text().strip().endswith(table.strip())

    written = results.read_text()
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.stdout.split("\n\n")[-1] == table
    assert results.read_text() == written


@pytest.mark.slow
def test_a_failure_is_a_line_and_the_next_figure_is_measured(part: Any, tmp_path: Path) -> None:
    session = session_of(part, tmp_path)
    wanted = [
        figure(part, "broken", divmod),  # takes no scale
        figure(part, "slow", part("gpu_session.scans").times, needs=0.0),  # ended at once
        figure(part, "scan", part("gpu_session.scans").times),
    ]
    try:
        session.run(wanted)
    finally:
        session.close()
    table = part("gpu_session.tables").table("cache", wanted, session.found())
    assert "| broken | torch | 2 | - | - | - | failed: RuntimeError: TypeError: divmod expected 2 arguments" in table
    assert "| slow | torch | 2 | - | - | - | failed: TimeoutError: no answer after 0 s |" in table
    assert session.found()["scan, torch, N=2"]["milliseconds"] > 0
    assert [left.section for left in session.missing(wanted)] == ["broken", "slow"]


@pytest.mark.slow
def test_a_process_that_ends_or_hangs_is_told_and_left(part: Any) -> None:
    worker = part("gpu_session.workers").Worker("torch")
    with pytest.raises(RuntimeError, match="exit code 3"):
        worker.ask(os._exit, 3, limit=PATIENCE)
    assert not worker.is_alive
    worker = part("gpu_session.workers").Worker("torch")
    worker.wait(PATIENCE)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        worker.ask(time.sleep, 100, limit=0.5)
    assert time.monotonic() - start < 50
    assert not worker.is_alive


def test_what_no_longer_fits_is_skipped_with_a_line(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(part("gpu_session.session"), "Worker", None)  # nothing may start
    session = session_of(part, tmp_path, budget=10.0)
    wanted = [figure(part, "long", divmod, needs=11.0)]
    monkeypatch.setattr(part("gpu_session.cache"), "build", None)
    assert "| long | torch | 2 | - | - | - | not measured |" in part("gpu").run(session, wanted)
    assert "long, torch, N=2: skipped, needs 11 s of the " in capsys.readouterr().out
    assert not session.results.path.exists()


def test_figures_of_another_machine_are_measured_anew(part: Any, tmp_path: Path) -> None:
    session, wanted = session_of(part, tmp_path), [figure(part, "scan", divmod)]
    session.take(wanted[0].name, lambda: {"milliseconds": 1.0})
    assert session.missing(wanted) == []
    assert session_of(part, tmp_path, driver="580").missing(wanted) == wanted


def test_every_figure_has_a_name_of_its_own_and_the_checks_come_first(part: Any) -> None:
    for scale in (part("gpu_session.scale").full("cuda"), part("gpu_session.scale").toy("cpu")):
        figures = list(part("gpu").figures(scale))
        assert len({figure.name for figure in figures}) == len(figures)
        assert [figure.section for figure in figures[:6]] == [
            *(["scan against float64, float32"] * 3),
            *(["scan against float64, bfloat16"] * 3),
        ]
        assert {figure.worker for figure in figures} == set(WAYS)


def test_a_wrong_scan_has_an_error_and_other_bits(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, scale = part("gpu_session.scans"), part("gpu_session.scale").toy("cpu")
    right = scans.errors("torch", 3, scale, dtype="float32")
    assert set(right["errors"]) == {"out", "last state", *(f"gradient of {name}" for name in ARGUMENTS)}
    assert max(right["errors"].values()) < 1e-5
    assert right["same bits"]
    noise = torch.Generator().manual_seed(0)

    def noisy(u: Any, *args: Any, **kwargs: Any) -> Any:
        out, last = scans.selective_scan(u, *args, **kwargs)
        return out * (1 + 0.1 * torch.rand((), generator=noise)), last

    monkeypatch.setattr(scans, "scan_of", lambda way: noisy)
    wrong = scans.errors("torch", 3, scale, dtype="float32")
    assert wrong["errors"]["out"] > 1e-3
    assert wrong["errors"]["last state"] < 1e-5
    assert not wrong["same bits"]


@pytest.fixture
def ways(part: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The ways, with stand-ins for the kernels of both that work on the CPU."""
    module = part("gpu_session.ways")
    kernel = SimpleNamespace(has_kernel=lambda device: device.type == "cpu")
    monkeypatch.setattr(module, "selective_kernel", kernel)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = selective_scan
    module.reason_against.cache_clear()
    yield module
    module.reason_against.cache_clear()


def test_a_way_is_measured_where_its_kernels_work(part: Any, ways: Any) -> None:
    scans, steps, scale = part("gpu_session.scans"), part("gpu_session.steps"), part("gpu_session.scale").toy("cpu")
    for way in WAYS:
        found = scans.times(way, 2, scale)
        assert found["milliseconds"] > 0
        assert "share" not in found  # of a GPU alone
        assert max(scans.errors(way, 2, scale, dtype="float32")["errors"].values()) < 1e-5
    assert steps.step_times("triton", 2, scale, "mamba")["tokens"] > 0
    assert steps.step_times("triton", 2, scale, "lru") == {"absent": "the Triton kernels do not work on cpu"}
    assert steps.step_times("mamba-ssm", 2, scale, "mamba") == {"absent": "mamba_inner_fn does not work on cpu"}


def test_a_compiled_step_is_timed(part: Any) -> None:
    scale = replace(part("gpu_session.scale").toy("cpu"), layers=1, length=4, repeats=1)
    found = part("gpu_session.steps").step_times("torch, compiled", 2, scale, "mamba")
    assert found["first step"] > 10 * found["milliseconds"] / 1000  # it compiles
    torch.compiler.reset()


def test_every_variant_of_the_kernels_is_called(part: Any) -> None:
    cache, scale = part("gpu_session.cache"), part("gpu_session.scale").toy("cpu")
    variants = cache.variants(scale)
    assert len(variants) == len(set(variants)) == 2 * 2 * 8 + 2
    assert [cache.call(variant, scale) for variant in variants] == [""] * len(variants)
    assert "float7" in cache.call(("float7", 2, ()), scale)


def test_the_roofline_is_that_of_the_slower_of_instructions_and_exponentials(part: Any) -> None:
    roofline = part("gpu_session.roofline")
    hopper = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0)
    forward, both = roofline.least_milliseconds((8, 1536, 2048), 16, hopper)
    exponentials = 8 * 1536 * 2048 * 16 / (132 * 1.755e9 * 16) * 1e3
    assert forward == pytest.approx(2 * exponentials)  # two passes with one each, which outweigh their instructions
    assert both == pytest.approx(0.65, rel=0.01)
    assert roofline.least_milliseconds((8, 1536, 2048), 128, hopper)[1] > 8 * both  # more instructions above 32
    assert roofline.least_milliseconds((8, 1536, 2048), 16, SimpleNamespace(name="another")) is None
    ampere = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", multi_processor_count=108, major=8, minor=0)
    assert roofline.least_milliseconds((8, 1536, 2048), 16, ampere)[1] > both


def test_waits_are_counted_by_place_and_step(part: Any) -> None:
    trainers = part("gpu_session.trainers")
    with trainers.every_wait("cpu") as seen:
        steps = trainers.Steps(seen)
        for count in (1, 3, 1):
            for _ in range(count):
                torch.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            torch.warnings.warn("something else", stacklevel=1)
            steps.on_step_end()
        waits = trainers.waits_of(seen)
    assert steps.usual == 1
    assert len(waits) == 5
    assert all(wait.startswith("tests/benchmarks/test_gpu.py:") for wait in waits)


def test_results_are_json_lines_with_the_machine(part: Any, tmp_path: Path) -> None:
    session = session_of(part, tmp_path)
    session.take("one", lambda: {"milliseconds": 1.0})
    session.take("two", lambda: 1 / 0)
    one, two = map(json.loads, session.results.path.read_text().splitlines())
    assert (one["name"], one["milliseconds"], one["machine"]) == ("one", 1.0, MACHINE)
    assert two["failed"].startswith("ZeroDivisionError")
