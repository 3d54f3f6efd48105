"""The rules of the house as functions: parsed modules in, one line per breach out.

`test_house_rules.py` holds each against the package, and against a small bad package that must break it.
"""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


PACKAGE = "hf_compressm"
ROOF = 8  # the package's own __init__: it may import every floor, and no floor imports it
FLOORS = {
    "numerics": 1,
    "scans": 1,
    "models": 2,
    "adapters": 3,
    "surgery": 4,
    "bases": 5,
    "batches": 5,
    "checkpoints": 5,
    "compression": 5,
    "config": 5,
    "data": 5,
    "durable": 5,
    "processes": 5,
    "history": 5,
    "loading": 5,
    "scalars": 5,
    "callback": 6,
    "checkpoint_compression": 6,
    "fsdp_checkpoints": 6,
    "guard": 6,
    "hub": 6,
    "pace": 6,
    "publishing": 6,
    "recovery": 6,
    "refusals": 6,
    "reporting": 6,
    "resuming": 6,
    "saved_optimizers": 6,
    "sharded_states": 6,
    "saving": 6,
    "schedule": 6,
    "cli": 7,
}

OPTIONAL = frozenset(
    {"causal_conv1d", "datasets", "deepspeed", "kernels", "mamba_ssm", "mambapy", "matplotlib", "peft", "triton"}
)
MATHS = frozenset({"torch", "scipy", "numpy"})  # all that floor 1 may know, besides the standard library
MATHS_EXCEPTIONS = {
    # Its kernels are written in Triton; it is imported only where that is installed.
    f"{PACKAGE}.scans.boundary_triton": frozenset({"triton"}),
    # It puts the fast scan in the place of the slow loop inside transformers' own Mamba classes.
    f"{PACKAGE}.scans.stock": frozenset({"transformers", "mamba_ssm"}),
}

REGISTRATIONS = frozenset({"register", "register_for_auto_class"})

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # of the body: a long docstring is no fault
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")  # in pieces, so that this line does not match

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documentable = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Module:
    """A parsed source file; `name` is dotted, and that of a package is the name of its folder."""

    path: Path
    name: str
    source: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def floor(self) -> int | None:
        """The floor that the module lives on; None is a module for which the table has no row."""
        return floor_of(self.name)

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


@dataclass(frozen=True)
class Import:
    """One imported module: `target` is the full dotted name, `names` what is taken from it."""

    node: ast.Import | ast.ImportFrom
    target: str
    names: tuple[str, ...] = ()

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


def floor_of(name: str) -> int | None:
    return ROOF if name == PACKAGE else FLOORS.get(name.split(".")[1])


def load(root: Path, folder: str = PACKAGE) -> dict[str, Module]:
    """Parses every Python file below `root / folder`, keyed by dotted name."""
    modules = {}
    for path in sorted((root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        modules[name] = Module(path, name, source, ast.parse(source, filename=str(path)))
    return modules


def absolute(module: Module, node: ast.ImportFrom) -> str:
    """Resolves the module of a `from` import, with as many leading dots as it has."""
    if node.level == 0:
        return node.module or ""
    package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, node.module] if node.module else base)


def imports(module: Module, tree: ast.AST | None = None) -> Iterator[Import]:
    """Yields every import below `tree`, by default the whole file, inside functions and `if TYPE_CHECKING` too."""
    for node in ast.walk(tree or module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node, alias.name)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node, absolute(module, node), tuple(alias.name for alias in node.names))


def imported_modules(entry: Import, modules: dict[str, Module]) -> list[str]:
    """Returns the modules of the package that an import runs; `from .x import y` may name the module x.y."""
    if entry.top != PACKAGE:
        return []
    submodules = [f"{entry.target}.{name}" for name in entry.names if f"{entry.target}.{name}" in modules]
    others = [name for name in entry.names if f"{entry.target}.{name}" not in modules]
    return submodules + ([entry.target] if others or not entry.names else [])


def functions(module: Module) -> list[Function]:
    return [node for node in ast.walk(module.tree) if isinstance(node, Function)]


def upward_imports(modules: dict[str, Module]) -> list[str]:
    """Lower floors never import higher ones, and every module has a floor."""
    found = [
        f"{module.path}: has no floor; give {name.split('.')[1]!r} a row in FLOORS"
        for name, module in modules.items()
        if module.floor is None
    ]
    for module in modules.values():
        for entry in imports(module):
            for target in imported_modules(entry, modules):
                floor = floor_of(target)
                if module.floor is not None and floor is not None and floor > module.floor:
                    found.append(module.at(entry.node, f"floor {module.floor} imports {target}, on floor {floor}"))
    return found


def import_cycles(modules: dict[str, Module]) -> list[str]:
    """No module reaches itself through imports."""
    graph = {
        name: {target for entry in imports(module) for target in imported_modules(entry, modules)}
        for name, module in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"import cycle: {' -> '.join(reversed(error.args[1]))}"]
    return []


def hidden_imports(modules: dict[str, Module]) -> list[str]:
    """Imports inside functions are for optional dependencies only."""
    return sorted(
        {
            module.at(entry.node, f"imports {entry.target} inside {function.name}(); move it to the top of the file")
            for module in modules.values()
            for function in functions(module)
            for entry in imports(module, function)
            if entry.top not in OPTIONAL
        }
    )


def impure_maths(modules: dict[str, Module]) -> list[str]:
    """Floor 1 knows torch, scipy, numpy and the standard library, and nothing of Hugging Face."""
    return [
        module.at(entry.node, f"floor 1 imports {entry.target}")
        for module in modules.values()
        if module.floor == 1
        for entry in imports(module)
        if entry.top not in {PACKAGE, *sys.stdlib_module_names, *MATHS, *MATHS_EXCEPTIONS.get(module.name, ())}
    ]


def undeclared_imports(modules: dict[str, Module], declared: set[str]) -> list[str]:
    """The package imports what setup.py requires, or what is optional."""
    return [
        module.at(entry.node, f"imports {entry.target}, which is neither in INSTALL_REQUIRES nor optional")
        for module in modules.values()
        for entry in imports(module)
        if entry.top not in {PACKAGE, *sys.stdlib_module_names, *declared, *OPTIONAL}
    ]


def long_files(modules: dict[str, Module]) -> list[str]:
    """One concept per file."""
    return [
        f"{module.path}: {lines} lines, over {MAX_FILE_LINES}"
        for module in modules.values()
        if (lines := len(module.source.splitlines())) > MAX_FILE_LINES
    ]


def long_functions(modules: dict[str, Module]) -> list[str]:
    """Functions that fit a screen, docstrings not counted."""
    found = []
    for module in modules.values():
        for function in functions(module):
            body = function.body[1:] if ast.get_docstring(function) is not None else function.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > MAX_FUNCTION_LINES:
                found.append(module.at(function, f"{function.name}() has {lines} lines, over {MAX_FUNCTION_LINES}"))
    return found


def exported_names(module: Module) -> list[str] | None:
    """Returns the names in `__all__`, or None where the file has none that can be read without running it."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return list(ast.literal_eval(node.value))
            except (TypeError, ValueError):
                return None
    return None


def export_order(name: str) -> tuple[int, list[tuple[str, int]]]:
    """Orders `__all__` as ruff's RUF022 does: constants, classes, the rest; numbers inside names by their value."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    pieces = re.findall(r"(\D*)(\d*)", name)
    return kind, [(text, int(number or -1)) for text, number in pieces]


def unclear_exports(modules: dict[str, Module]) -> list[str]:
    """Every `__init__` names its public surface in a sorted `__all__`, without duplicates."""
    found = []
    for module in modules.values():
        if not module.is_package:
            continue
        names = exported_names(module)
        if names is None:
            found.append(f"{module.path}: has no literal __all__")
        elif names != sorted(set(names), key=export_order):
            found.append(f"{module.path}: __all__ is not sorted, or names something twice")
    return found


def is_init_statement(node: ast.stmt) -> bool:
    """Tells whether a statement has a place in an `__init__`: imports, dunder names, docstring, `Auto*.register`."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Assign):
        return all(isinstance(t, ast.Name) and t.id.startswith("__") for t in node.targets)
    if isinstance(node, ast.For):
        return all(is_init_statement(inner) for inner in node.body)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return isinstance(node.value.func, ast.Attribute) and node.value.func.attr in REGISTRATIONS
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def busy_inits(modules: dict[str, Module]) -> list[str]:
    """An `__init__` does nothing but name things and register Auto classes."""
    return [
        module.at(node, "an __init__ only imports, names and registers")
        for module in modules.values()
        if module.is_package
        for node in module.tree.body
        if not is_init_statement(node)
    ]


def definition(name: str, module: Module, modules: dict[str, Module]) -> ast.AST | None:
    """Follows a name through imports inside the package to the statement, or module, that defines it."""
    for node in module.tree.body:
        if isinstance(node, Documentable) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if (alias.asname or alias.name) != name:
                continue
            source = absolute(module, node) if isinstance(node, ast.ImportFrom) else ""
            if f"{source}.{alias.name}" in modules:
                return modules[f"{source}.{alias.name}"].tree
            return definition(alias.name, modules[source], modules) if source in modules else node
    return modules[f"{module.name}.{name}"].tree if f"{module.name}.{name}" in modules else None


def undocumented_exports(modules: dict[str, Module]) -> list[str]:
    """Every exported class, function and module has a docstring; constants speak for themselves."""
    found = []
    for module in modules.values():
        for name in exported_names(module) or ():
            node = definition(name, module, modules)
            if node is None:
                found.append(f"{module.path}: exports {name}, which it does not define")
            elif isinstance(node, Documentable | ast.Module) and not ast.get_docstring(node):
                found.append(f"{module.path}: exports {name}, which has no docstring")
    return found


def unfinished(modules: dict[str, Module]) -> list[str]:
    """No marks of unfinished work."""
    return [
        f"{module.path}:{number}: {line.strip()}"
        for module in modules.values()
        for number, line in enumerate(module.source.splitlines(), start=1)
        if UNFINISHED.search(line)
    ]


def printing(modules: dict[str, Module]) -> list[str]:
    """The package logs; it does not print."""
    return [
        module.at(node, "prints; use transformers.utils.logging")
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def public_functions(body: list[ast.stmt]) -> Iterator[Function]:
    """Yields public functions and the methods of public classes, with `__init__`; not functions inside functions."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__init__"):
            yield node


def missing_hints(modules: dict[str, Module]) -> list[str]:
    """Public functions annotate every named argument and what they return."""
    found = []
    for module in modules.values():
        for function in public_functions(module.tree.body):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
            if function.returns is None and function.name != "__init__":
                bare.append("return")
            if bare:
                found.append(module.at(function, f"{function.name}() has no type hint for {', '.join(bare)}"))
    return found


def broken_python_blocks(markdown: str) -> list[str]:
    """Every ```python block compiles; an unclosed fence is a breach too."""
    found = [] if len(re.findall(r"^```", markdown, flags=re.MULTILINE)) % 2 == 0 else ["a fence is not closed"]
    for match in re.finditer(r"^```python[^\n]*\n(.*?)^```[ \t]*$", markdown, flags=re.MULTILINE | re.DOTALL):
        line = markdown.count("\n", 0, match.start()) + 1
        try:
            compile(match.group(1), f"block at line {line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError as error:
            found.append(f"block at line {line}: {error}")
    return found
