import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house_rules as rules


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
README_COMMAND = ROOT / ".ci" / "readme_test_command.py"
needs_readme = pytest.mark.skipif(not README.exists(), reason="no README.md; without it setup.py does not install")
IMPORT_NAMES = {"pyyaml": "yaml"}  # where a distribution and its module differ

# A package that keeps every rule; each case below spoils it in one place.
CLEAN = {
    "__init__.py": 'from hf_compressm.numerics import solve\n\n\n__all__ = ["solve"]\n__version__ = "0"\n',
    "numerics/__init__.py": 'from .solvers import solve\n\n\n__all__ = ["solve"]\n',
    "numerics/solvers.py": 'import torch\n\n\ndef solve(x: int) -> int:\n    """Solves."""\n    return x\n',
    "config.py": "",
}
LONG_BODY = "def long() -> None:\n" + "    pass\n" * (rules.MAX_FUNCTION_LINES + 1)
DOCUMENTED_LONG = 'def long() -> None:\n    """' + "\n" * 99 + '"""\n' + "    pass\n" * rules.MAX_FUNCTION_LINES

RULES = [
    rules.upward_imports,
    rules.import_cycles,
    rules.hidden_imports,
    rules.impure_maths,
    rules.long_files,
    rules.long_functions,
    rules.unclear_exports,
    rules.busy_inits,
    rules.undocumented_exports,
    rules.unfinished,
    rules.printing,
    rules.missing_hints,
]

BREACHES = [
    (rules.upward_imports, "numerics/a.py", "import hf_compressm.config\n"),
    (rules.upward_imports, "numerics/a.py", "from ..config import x\n"),
    (rules.upward_imports, "numerics/a.py", "from .. import config\n"),
    (rules.upward_imports, "numerics/a.py", "def f():\n    from hf_compressm import config\n"),
    (rules.upward_imports, "config.py", "from hf_compressm import solve\n"),
    (rules.upward_imports, "attic.py", ""),
    (rules.import_cycles, "numerics/solvers.py", "from . import solve\n"),
    (rules.import_cycles, "numerics/solvers.py", "from hf_compressm.numerics import solvers\n"),
    (rules.hidden_imports, "config.py", "def f():\n    import torch\n"),
    (rules.hidden_imports, "config.py", "class A:\n    def f(self):\n        from .numerics import solve\n"),
    (rules.impure_maths, "numerics/a.py", "import transformers\n"),
    (rules.impure_maths, "scans/a.py", "def f():\n    from transformers.utils import logging\n"),
    (rules.long_files, "config.py", "\n" * (rules.MAX_FILE_LINES + 1)),
    (rules.long_functions, "config.py", LONG_BODY),
    (rules.unclear_exports, "numerics/__init__.py", "from .solvers import solve\n"),
    (rules.unclear_exports, "numerics/__init__.py", '__all__ = ["b", "a"]\n'),
    (rules.unclear_exports, "numerics/__init__.py", '__all__ = ["a", "a"]\n'),
    (rules.unclear_exports, "numerics/__init__.py", "__all__ = sorted(globals())\n"),
    (rules.busy_inits, "numerics/__init__.py", '__all__ = []\nif True:\n    print("hello")\n'),
    (rules.busy_inits, "numerics/__init__.py", "__all__ = []\nfor x in ():\n    print(x)\n"),
    (rules.busy_inits, "numerics/__init__.py", "__all__ = []\n\n\ndef f():\n    pass\n"),
    (rules.undocumented_exports, "numerics/solvers.py", "def solve(x: int) -> int:\n    return x\n"),
    (rules.undocumented_exports, "numerics/solvers.py", "class solve:\n    pass\n"),
    (rules.undocumented_exports, "numerics/__init__.py", '__all__ = ["missing"]\n'),
    (rules.unfinished, "config.py", "x = 1  # TO" + "DO: more\n"),
    (rules.printing, "config.py", "def f():\n    print(1)\n"),
    (rules.missing_hints, "config.py", "def f(x) -> int:\n    return x\n"),
    (rules.missing_hints, "config.py", "class A:\n    def f(self, *, x: int):\n        return x\n"),
    (rules.missing_hints, "config.py", "class A:\n    def __init__(self, x):\n        pass\n"),
]

KEPT = [
    (rules.upward_imports, "config.py", "from .numerics import solve\nfrom hf_compressm import numerics\n"),
    (rules.import_cycles, "numerics/a.py", "from .solvers import solve\n"),
    (rules.hidden_imports, "config.py", "def f():\n    import matplotlib.pyplot as plt\n"),
    (rules.impure_maths, "scans/stock.py", "import math\n\nimport transformers\n"),
    (rules.long_functions, "config.py", DOCUMENTED_LONG),
    (rules.unclear_exports, "numerics/__init__.py", '__all__ = ["MAX", "S5", "S10", "LRUModel", "a2", "a10"]\n'),
    (rules.busy_inits, "models/__init__.py", '__all__ = []\nAutoConfig.register("s5", S5Config)\n'),
    (rules.busy_inits, "models/__init__.py", "for auto, model in ():\n    auto.register(model)\n"),
    (rules.undocumented_exports, "numerics/solvers.py", "solve = 1\n"),
    (rules.missing_hints, "config.py", "class _A:\n    def f(self, x):\n        pass\n"),
    (rules.missing_hints, "config.py", "def f(*args, **kwargs) -> None:\n    def g(x):\n        pass\n"),
]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / rules.PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def literal(name: str) -> list[str]:
    """Reads a list of strings out of setup.py without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no {name}")


def required_modules() -> set[str]:
    names = [re.split(r"[<>=!~ ;\[]", requirement)[0] for requirement in literal("INSTALL_REQUIRES")]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    modules = rules.load(ROOT)
    assert rules.PACKAGE in modules
    assert rule(modules) == []


@pytest.mark.parametrize("rule", [rules.long_files, rules.long_functions, rules.unfinished], ids=lambda r: r.__name__)
def test_examples_keep_the_rule(rule):
    assert rule(rules.load(ROOT, "examples")) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_package_keeps_the_rule(rule, tmp_path):
    assert rule(rules.load(write(tmp_path, CLEAN))) == []


@pytest.mark.parametrize(("rule", "name", "source"), BREACHES)
def test_a_breach_is_found(rule, name, source, tmp_path):
    breaches = rule(rules.load(write(tmp_path, CLEAN | {name: source})))
    assert breaches
    assert all(rules.PACKAGE in breach for breach in breaches)


@pytest.mark.parametrize(("rule", "name", "source"), KEPT)
def test_what_is_allowed_is_no_breach(rule, name, source, tmp_path):
    assert rule(rules.load(write(tmp_path, CLEAN | {name: source}))) == []


def test_every_rule_has_a_breach():
    assert {rule for rule, _, _ in BREACHES} == set(RULES)


def test_the_package_imports_what_it_requires():
    assert rules.undeclared_imports(rules.load(ROOT), required_modules()) == []


def test_an_undeclared_import_is_found(tmp_path):
    modules = rules.load(write(tmp_path, {"config.py": "import os\nimport yaml\nimport requests\n"}))
    breaches = rules.undeclared_imports(modules, required_modules())
    assert len(breaches) == 1
    assert "requests" in breaches[0]


@needs_readme
def test_the_readme_blocks_compile():
    assert rules.broken_python_blocks(README.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("text", ["```python\nx = \n```\n", "```python\nx = 1\n", "text\n```python\n  y\nz\n```\n"])
def test_a_broken_block_is_found(text):
    assert rules.broken_python_blocks(text)


def test_whole_blocks_are_no_breach():
    assert rules.broken_python_blocks("```sh\nls |\n```\n\n```python\nx = 1\n```\n") == []


def run_readme_command(readme: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, README_COMMAND, readme], capture_output=True, text=True, check=False)


@needs_readme
def test_the_readme_has_one_test_command():
    found = run_readme_command(README)
    assert found.returncode == 0, found.stderr
    assert "-m pytest" in found.stdout


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_readme_without_one_test_command_is_refused(blocks, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("```sh\nls\n```\n" + "```sh\npython -m pytest\n```\n" * blocks, encoding="utf-8")
    found = run_readme_command(readme)
    assert found.returncode == 1
    assert f"{blocks} of the {blocks + 1}" in found.stderr
