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
    """One line that means nothing special to Markdown or HTML: special characters are written as their numbers."""
    line = " ".join(str(text).split())
    return _MEANS_SOMETHING.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", line)


def code(text: object) -> str:
    """One line as code; characters that could end the code, or a cell of a table, are replaced."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "/")
    return f"`{line}`" if line else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are text."""
    lines = [f"| {' | '.join(map(escaped, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])
