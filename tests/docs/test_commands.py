"""Commands and options that the pages name are those of the command line."""

import re
import shlex

import pytest
import typer.main

from hf_compressm.cli.app import app
from tests.docs.pages import LINKED_PAGES, ROOT, blocks


def lines(text: str) -> list[list[str]]:
    """Calls of `hf-compressm` in shell code, split into words."""
    whole = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in whole if re.match(r"\s*hf-compressm ", line)]


CALLS = [
    pytest.param(call, id=f"{page.relative_to(ROOT)}-{call[1]}-{number}")
    for page in LINKED_PAGES
    for block in blocks(page, "sh", "bash")
    for number, call in enumerate(lines(block))
]


@pytest.mark.parametrize("call", CALLS)
def test_command_and_options_exist(call):
    commands = typer.main.get_command(app).commands
    assert call[1] in commands
    options = {name for item in commands[call[1]].params for name in [*item.opts, *item.secondary_opts]}
    given = {word.partition("=")[0] for word in call[2:] if word.startswith("--")}
    assert given <= options


def test_calls_are_found():
    assert len(CALLS) > 5
    assert lines("ls\nhf-compressm verify a \\\n  --json  # looks\n") == [["hf-compressm", "verify", "a", "--json"]]
