"""The structure of the package: rooms on floors, few arrows between them, and nothing long.

What a tool states in a line of settings is in pyproject.toml: ruff for lint, mypy for types, import-linter for floors.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_compressm"
HALL = {"__init__.py", "callback.py", "config.py"}
MOST_ARROWS = 70
MOST_LINES = {"file": 400, "callback.py": 200, "function": 60}
OPTIONAL = {"causal_conv1d", "datasets", "kernels", "mamba_ssm", "mambapy", "matplotlib", "peft", "triton"}
IMPORT_NAMES = {"pyyaml": "yaml"}  # where a distribution and its module differ


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter with the settings of pyproject.toml on the package in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    settings = ["--config", str(ROOT / "pyproject.toml")]
    return subprocess.run([*command, *settings], cwd=folder, capture_output=True, text=True, check=False)


def test_the_hall_has_three_files():
    assert {path.name for path in PACKAGE.glob("*.py")} == HALL


def test_floors_and_rooms_are_kept():
    found = lint_imports(ROOT)
    assert found.returncode == 0, found.stdout
    assert "3 kept, 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("numerics/ranks.py", "import hf_compressm.families.family"),  # upward
        ("compression/plan.py", "import hf_compressm.compression.planning"),  # in a circle
        ("scans/ssd.py", "import transformers"),  # maths that knows Hugging Face
        ("attic.py", ""),  # a room without a floor
    ],
)
def test_a_breach_is_found(room: str, line: str, tmp_path: Path):
    copied = Path(shutil.copytree(PACKAGE, tmp_path / "hf_compressm", ignore=shutil.ignore_patterns("__pycache__")))
    with (copied / room).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    found = lint_imports(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr


def test_few_arrows_lead_from_room_to_room():
    graph = grimp.build_graph("hf_compressm", exclude_type_checking_imports=True, cache_dir=None)
    rooms = graph.find_children("hf_compressm")
    for room in rooms:
        graph.squash_module(room)
    arrows = {(room, other) for room in rooms for other in graph.find_modules_directly_imported_by(room) - {room}}
    assert 40 < len(arrows) <= MOST_ARROWS


def test_nothing_is_long():
    long = []
    for path, tree in sources("hf_compressm", "examples"):
        if tree.body and (tree.body[-1].end_lineno or 0) > MOST_LINES.get(path.name, MOST_LINES["file"]):
            long.append(str(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 > MOST_LINES["function"]:
                    long.append(f"{path}:{node.lineno} {node.name}")
    assert long == []


def test_the_package_imports_what_it_requires():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = ast.literal_eval(setup[setup.index("INSTALL_REQUIRES = ") :].split(" = ", 1)[1].split("\n\n")[0])
    names = {re.split(r"[<>=!~ ;\[]", requirement)[0] for requirement in required}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    used = set()
    for _, tree in sources("hf_compressm"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                used.add((node.module or "").split(".")[0])
    assert used - known - OPTIONAL - sys.stdlib_module_names == {"hf_compressm"}


def run_readme_command(readme: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / ".ci" / "readme_test_command.py"
    return subprocess.run([sys.executable, script, readme], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md")
def test_the_readme_has_one_test_command():
    found = run_readme_command(ROOT / "README.md")
    assert found.returncode == 0, found.stderr
    assert "-m pytest" in found.stdout


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_readme_without_one_test_command_is_refused(blocks: int, tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("```sh\nls\n```\n" + "```sh\npython -m pytest\n```\n" * blocks, encoding="utf-8")
    found = run_readme_command(readme)
    assert found.returncode == 1
    assert f"{blocks} of the {blocks + 1}" in found.stderr
