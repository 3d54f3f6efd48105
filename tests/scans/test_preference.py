"""Which kernel of the selective scan runs where mamba-ssm's and ours both work, with stand-ins on the CPU."""

import time

import pytest
import torch

import hf_compressm.scans.dispatchers as dispatchers
import hf_compressm.scans.preference as preference
from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from hf_compressm.scans.selective_chunks import chunked_selective_scan
from tests.scans.test_stock import bind_fakes, fake_packages, make_model, make_tokens


PAUSE = 0.01


@pytest.fixture
def both(monkeypatch):
    """mamba-ssm works on the CPU, and so does a stand-in for ours; returns the calls of mamba-ssm."""
    enable_fast_selective_scan()  # imports the modeling files while transformers finds no mamba-ssm
    disable_fast_selective_scan()
    calls, modules = fake_packages(monkeypatch, works_on=("cpu",))
    bind_fakes(monkeypatch, modules)
    monkeypatch.setattr(preference, "has_kernel", lambda device, dtype: True)
    monkeypatch.setattr(preference, "fused_selective_scan", chunked_selective_scan)
    for name in ("BATCH", "CHANNELS", "LENGTH"):
        monkeypatch.setattr(preference, name, 2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    preference._measured.cache_clear()
    enable_fast_selective_scan()
    yield calls
    disable_fast_selective_scan()


def slowed(function):
    def slow(*args, **kwargs):
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    return slow


def scans_of_ours(monkeypatch):
    seen, scan = [], dispatchers.selective_scan
    monkeypatch.setattr(dispatchers, "selective_scan", lambda *args: seen.append(args) or scan(*args))
    return seen


@pytest.mark.parametrize("ours_is_slow", [False, True])
def test_the_faster_one_runs(ours_is_slow, both, monkeypatch):
    name = "fused_selective_scan" if ours_is_slow else "kernels"
    if ours_is_slow:
        monkeypatch.setattr(preference, name, slowed(preference.fused_selective_scan))
    else:
        load = preference.kernels.load
        monkeypatch.setattr(preference.kernels, "load", lambda kernel: slowed(load(kernel)))
    seen, model = scans_of_ours(monkeypatch), make_model("mamba")
    model(make_tokens())
    both.clear()
    seen.clear()
    model(make_tokens())
    assert len(seen) == (0 if ours_is_slow else 2)
    assert both == (["mamba_inner_fn", "selective_scan_fn"] * 2 if ours_is_slow else [])


def test_deterministic_algorithms_are_ours(both, monkeypatch):
    monkeypatch.setattr(preference, "_measured", raises)  # nothing is timed
    torch.use_deterministic_algorithms(True)
    seen = scans_of_ours(monkeypatch)
    make_model("mamba")(make_tokens())
    assert len(seen) == 2


def test_the_device_of_the_tensors_is_waited_for(both, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    preference._measured(torch.device("cpu"), torch.float32, 2)
    assert set(waited) == {torch.device("cpu")}


@pytest.mark.parametrize("fails", ["the trial", "the timing"])
def test_mamba_ssm_runs_where_ours_does_not(fails, both, monkeypatch):
    if fails == "the trial":
        monkeypatch.setattr(preference, "has_kernel", lambda device, dtype: False)
    else:
        monkeypatch.setattr(preference, "_seconds", raises)
    seen = scans_of_ours(monkeypatch)
    make_model("mamba")(make_tokens())
    assert not seen
    assert both.count("mamba_inner_fn") >= 2


def raises(*_):
    raise torch.OutOfMemoryError("no room for the trial")
