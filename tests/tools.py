"""Tools that a few slow tests need beside the test extra; skipped without them, unless the run is to have them."""

import importlib
import os
import shutil
from typing import Any

import pytest


NEEDS_ALL = bool(os.environ.get("NEEDS_ALL_TOOLS"))
"""Set where everything is installed, so that a test that would be skipped fails."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def module(name: str) -> Any:
    """An installed module; skips the test file without it."""
    return importlib.import_module(name) if NEEDS_ALL else pytest.importorskip(name)


def browser() -> str:
    """Path of Chromium; skips the test without it."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        assert not NEEDS_ALL, "this run is to have Chromium (Debian: apt install chromium)"
        pytest.skip("there is no Chromium on this machine")
    return found
