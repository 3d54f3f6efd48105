"""What the tests of benchmarks share."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_compressm.scans import disable_fast_selective_scan


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of a benchmark as its script does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "comparison"))
    yield importlib.import_module
    disable_fast_selective_scan()
