"""Text of unknown origin inside Markdown: names of layers, metrics and models stay text, and tables stay tables."""

import re
from collections.abc import Sequence


_MEANS_SOMETHING = re.compile(
    r"[\\`*\[\]<>|~$&#!{}@]"  # code, emphasis, links, HTML, cells, formulas, mentions
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis again, but not inside a name
    r"|:(?=//)|(?<=www)\."  # links without brackets
    r"|^[-+=]|^\d+[.)](?!\S)"  # lists and headings
)


def escaped(text: object) -> str:
    """One line in which nothing means anything to Markdown or HTML: what would is written as its number."""
    line = " ".join(str(text).split())
    return _MEANS_SOMETHING.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", line)


def code(text: object) -> str:
    """One line as code; what could end the code, or a cell of a table, is replaced."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "/")
    return f"`{line}`" if line else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are text."""
    lines = [f"| {' | '.join(map(escaped, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])
