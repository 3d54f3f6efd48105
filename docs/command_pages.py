"""Commands of `hf-compressm` as Markdown, from the application that reads them."""

import inspect
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import typer.main

from hf_compressm.cli.app import app


KINDS = {str: "text", int: "whole number", float: "number", bool: "switch", Path: "path"}

UNLESS = re.compile(r"(.*) \((\S+) unless given\)\.")
"""How the help of an option names its default."""


@cache
def commands() -> dict[str, Any]:
    """The built commands by name."""
    return dict(typer.main.get_command(app).commands)


def command_section(names: Sequence[str]) -> str:
    """Commands, each with its arguments and options; all commands without names."""
    return "\n\n".join(_command(name) for name in names or commands())


def _command(name: str) -> str:
    command = commands()[name]
    annotations = _annotations(name)
    arguments = [item for item in command.params if not _is_option(item)]
    groups: dict[str, list[Any]] = {}
    for item in command.params:
        if _is_option(item):
            groups.setdefault(getattr(item, "rich_help_panel", None) or "Options", []).append(item)
    usage = " ".join(["hf-compressm", name, *(item.name.upper() for item in arguments), "[OPTIONS]"])
    parts = [f"### `{usage}`", inspect.cleandoc(command.help)]
    parts += [f"- `{item.name.upper()}`: {item.help}" for item in arguments]
    for panel, items in groups.items():
        rows = [f"| {panel.lower()} | value | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([*rows, *(_row(item, annotations[item.name]) for item in items)]))
    return "\n\n".join(parts)


def _row(item: Any, kind: str) -> str:
    names = ", ".join(f"`{name}`" for name in [*item.opts, *item.secondary_opts])
    default = "required" if item.required else "" if item.default in (None, False) else f"`{item.default}`"
    meaning = item.help
    if found := UNLESS.fullmatch(meaning):
        meaning, default = f"{found[1]}.", f"`{found[2]}`"
    return f"| {names} | {kind} | {default} | {meaning} |"


def _is_option(item: Any) -> bool:
    return item.opts[0].startswith("-")


def _annotations(name: str) -> dict[str, str]:
    """What each parameter of a command takes, in words."""
    found = next(item for item in app.registered_commands if item.name == name)
    return {item.name: _in_words(item.annotation) for item in inspect.signature(found.callback).parameters.values()}


def _in_words(annotation: Any) -> str:
    """`Annotated[float | None, ...]` is a number, `list[str]` a text that may be given several times."""
    if hasattr(annotation, "__metadata__"):
        return _in_words(annotation.__origin__)
    if annotation in KINDS:
        return KINDS[annotation]
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    repeated = getattr(annotation, "__origin__", None) is list
    return _in_words(kinds[0]) + (", may be repeated" if repeated else "")
