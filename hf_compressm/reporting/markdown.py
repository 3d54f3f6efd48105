"""Text of unknown origin inside Markdown: names of layers, metrics and models stay text, and tables stay tables."""

import re
from collections.abc import Sequence


_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&@:.-])")
_HARMLESS = re.compile(r"[\w ,.%()→/:-]*")
_MEANS_SOMETHING = re.compile(r"://|www\.|(?<![^\W_])_|_(?![^\W_])|^\W*[-:]|^\d+[.)](?!\S)")
"""Links, emphasis, and what begins a list or ends a table, made of harmless characters alone."""


def escaped(text: object) -> str:
    """One line in which no character means anything to Markdown or HTML; readable where nothing has to be done."""
    line = " ".join(str(text).split())
    if _HARMLESS.fullmatch(line) and not _MEANS_SOMETHING.search(line):
        return line
    return _SPECIAL.sub(lambda found: f"&#{ord(found[1])};", line)


def code(text: object) -> str:
    """One line as code; what could end the code, or a cell of a table, is replaced."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "/")
    return f"`{line}`" if line else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are text."""
    lines = [f"| {' | '.join(map(escaped, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])
