"""The messages that troubleshooting explains are still those of the source."""

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT


MESSAGE = re.compile(r"^### `([^`]+(?:``[^`]+)*)`$", flags=re.MULTILINE)
VARIES = "…"


def joined(node: ast.AST) -> str | None:
    """A literal as one text, with `…` for what an f-string puts in; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(joined(part) or VARIES for part in node.values)
    return None


def texts(source: str) -> list[str]:
    """Every literal text of a module; neighbouring literals are one."""
    return [text for node in ast.walk(ast.parse(source)) if (text := joined(node))]


def test_neighbouring_literals_are_one_text():
    source = 'x = "a" "b"\ny = (\n    f"No {x} here. "\n    "Do this."\n)\n'
    assert {"ab", "No … here. Do this."} <= set(texts(source))


@pytest.fixture(scope="module")
def source() -> list[str]:
    files: list[Path] = sorted((ROOT / "hf_compressm").rglob("*.py"))
    return [text for file in files for text in texts(file.read_text(encoding="utf-8"))]


def explained() -> list[str]:
    return MESSAGE.findall((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))


def test_messages_are_explained_once():
    assert len(explained()) == len(set(explained())) > 30


@pytest.mark.parametrize("message", explained())
def test_the_message_is_in_the_source(source, message):
    assert any(message in text for text in source)
