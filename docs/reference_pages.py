"""Public names as Markdown, from the source: signatures and docstrings as they are written there."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any


LINE = 100
"""Longer signatures are broken, one argument a line."""

LINKED = {"CompreSSMConfig": "Every setting, with its default and what it may be: [options.md](options.md)."}
HEADINGS = ("Args", "Attributes", "Returns", "Yields", "Raises")

Definition = ast.FunctionDef | ast.ClassDef


def reference_section(modules: Sequence[str]) -> str:
    """All that `__all__` of each module names: classes, then functions."""
    parts = []
    for module in modules:
        names = importlib.import_module(module).__all__
        ordered = sorted(names, key=lambda name: not name[0].isupper())
        parts += [_entry(getattr(importlib.import_module(module), name)) for name in ordered]
    return "\n\n".join(parts)


def _entry(thing: Any) -> str:
    node = _definition(thing)
    ancestors = [_definition(kind) for kind in getattr(thing, "__mro__", ())[1:] if _is_own(kind)]
    parts = [f"### `{node.name}`", _code(_signature(node, ancestors)), _in_markdown(ast.get_docstring(node) or "")]
    parts += [_inherited(ancestor) for ancestor in ancestors if any(_fields(ancestor))]
    if node.name in LINKED:
        parts.append(LINKED[node.name])
    if isinstance(node, ast.ClassDef):
        methods, forward = [], []
        for item in _methods(node, ancestors):
            if item.name == "forward":
                forward = [_code(_signature(item)), _in_markdown(ast.get_docstring(item) or "")]
            else:
                methods.append(f"- `{_one_line(_signature(item))}`: {_summary(item)}")
        parts += ["**Methods and properties**", "\n".join(methods)] if methods else []
        parts += forward
    return "\n\n".join(part for part in parts if part)


def _is_own(kind: type) -> bool:
    return kind.__module__.startswith("hf_compressm.")


def _inherited(ancestor: ast.ClassDef) -> str:
    """What the docstring of a configuration's ancestor says of its fields."""
    _, _, arguments = _in_markdown(ast.get_docstring(ancestor) or "").partition("**Args**")
    return f"**Args, from {ancestor.name}**{arguments.partition('**Raises**')[0].rstrip()}"


@cache
def _parsed(path: Path) -> ast.Module:
    """The source of a file, where every expression remembers how it is written."""
    source = path.read_bytes()
    tree, lines = ast.parse(source), source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and node.end_lineno and node.end_col_offset:
            last = lines[node.end_lineno - 1][: node.end_col_offset]
            whole = [*lines[node.lineno - 1 : node.end_lineno - 1], last]
            whole[0] = whole[0][node.col_offset :]
            vars(node)["text"] = " ".join(b"\n".join(whole).decode("utf-8").split())
    return tree


def _text(node: ast.expr) -> str:
    """The expression as it is written, in one line."""
    return str(vars(node)["text"])


def _definition(thing: Any) -> Any:
    """Where a class or function is defined, as parsed source: decorators do not stand in between."""
    thing = inspect.unwrap(thing)
    path = Path(inspect.getsourcefile(importlib.import_module(thing.__module__)) or "")
    for node in _parsed(path).body:
        if isinstance(node, Definition) and node.name == thing.__name__:
            return node
    raise LookupError(f"{thing.__module__} does not define {thing.__name__}.")


def _signature(node: Definition, ancestors: Sequence[ast.ClassDef] = ()) -> list[str]:
    """Head, arguments, tail; a class has the arguments of its `__init__`, or the nearest ancestor's, or its fields."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {_text(node.returns)}" if node.returns is not None else ""
        if any(isinstance(item, ast.Name) and item.id == "property" for item in node.decorator_list):
            return [f"{node.name}{returns}", ""]
        return [f"{node.name}(", *_arguments(node.args), f"){returns}"]
    bases = ", ".join(_text(base) for base in node.bases)
    tail = f")  # subclass of {bases}" if bases else ")"
    inits = [item for kind in (node, *ancestors) for item in kind.body if getattr(item, "name", "") == "__init__"]
    if node.name in LINKED:
        return [f"{node.name}(", "...", tail]
    fields = [*_fields(node)]
    return [f"{node.name}(", *(_arguments(inits[0].args) if inits and not fields else fields), tail]


def _arguments(arguments: ast.arguments) -> list[str]:
    """Each argument as it is written, without `self` and `cls`."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [_argument(*pair) for pair in zip(positional, defaults, strict=True) if pair[0].arg not in ("self", "cls")]
    if arguments.vararg:
        found.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        found.append("*")
    found += [_argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*found, *([f"**{_argument(arguments.kwarg, None)}"] if arguments.kwarg else [])]


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {_text(argument.annotation)}" if argument.annotation else ""
    equals = " = " if kind else "="
    return f"{argument.arg}{kind}" + (f"{equals}{_text(default)}" if default is not None else "")


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Annotated attributes of a dataclass that are for its users."""
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        name, value = item.target.id, _text(item.value) if item.value is not None else ""
        if name.startswith("_") or "ClassVar" in _text(item.annotation) or "repr=False" in value:
            continue
        yield f"{name}: {_text(item.annotation)}" + (f" = {value}" if value else "")


def _methods(node: ast.ClassDef, ancestors: Sequence[ast.ClassDef]) -> Iterator[ast.FunctionDef]:
    """Public methods with a docstring, without the events of a Trainer; of the inherited ones `forward` alone."""
    seen = set()
    for kind in (node, *ancestors):
        for item in kind.body:
            if not isinstance(item, ast.FunctionDef) or not ast.get_docstring(item) or item.name in seen:
                continue
            wanted = kind is node and not item.name.startswith(("_", "on_", "validate_"))
            if wanted or item.name == "forward":
                seen.add(item.name)
                yield item


def _summary(node: Definition) -> str:
    return _plain_names(ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


def _one_line(signature: list[str]) -> str:
    head, *arguments, tail = signature
    return f"{head}{', '.join(arguments)}{tail}"


def _code(signature: list[str]) -> str:
    """A fenced block; `text`, since a signature is not a program."""
    head, *arguments, tail = signature
    line = _one_line(signature)
    if len(line) > LINE:
        line = "\n".join([head, *(f"    {argument}," for argument in arguments), tail])
    return f"```text\n{line}\n```"


def _in_markdown(docstring: str) -> str:
    """Headings of a docstring in bold, what is listed under them as a list, references to classes as plain names."""
    lines, heading = [], ""
    for line in docstring.splitlines():
        if line.rstrip(":") in HEADINGS and line.endswith(":"):
            heading = line.rstrip(":")
            lines += [f"**{heading}**", ""]
        elif line.startswith("    ") and heading:
            lines.append(_item(line[4:], heading))
        else:
            lines.append(line)
            heading = heading if not line else ""
    return (
        re.sub(r"\n{3,}", "\n\n", _plain_names("\n".join(lines))).replace("```python\n>>>", "\n```pycon\n>>>").strip()
    )


def _plain_names(text: str) -> str:
    """References to classes as transformers' own documentation resolves them, here as plain names."""
    return re.sub(r"\[(`)~?(?:\w+\.)*(\w+`)\]", r"\1\2", text)


def _item(line: str, heading: str) -> str:
    """`name: text` or `name (kind): text` becomes a list entry; lines that go on are kept under it."""
    if line.startswith("    "):
        return f"  {line.strip()}"
    found = re.fullmatch(r"(`?[\w*. ,]+`?)( \(.*\))?:( .*)?", line)
    if heading in ("Returns", "Yields") or not found:
        return line
    return f"- `{found[1].strip('`')}`{found[2] or ''}:{found[3] or ''}"
