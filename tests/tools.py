"""Tools that a few slow tests need beside the test extra; skipped without them, unless the run is to have them."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
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


def source_of(package: str, version: str, folder: Path) -> Path:
    """The unpacked source distribution of a package on PyPI, in a folder; skips the test where pip cannot fetch it."""
    name = f"{package}-{version}"
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", f"{package}=={version}"]
    result = subprocess.run([*download, "--dest", folder], capture_output=True, text=True, timeout=600)
    archive = folder / f"{name}.tar.gz"
    if result.returncode or not archive.exists():
        reason = f"pip could not fetch the source distribution of {name}: {result.stderr.strip()[-300:]}"
        assert not NEEDS_ALL, reason
        pytest.skip(reason)
    with tarfile.open(archive) as contents:
        contents.extractall(folder, filter="data")
    return folder / name
