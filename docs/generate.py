"""Writes the generated parts of `options.md`, and the reference `api.md`, which is not committed.

A page says what it wants between two comments, `<!-- begin KIND WORDS -->` and `<!-- end -->`; what is between them is
replaced. Settings come from the fields of `CompreSSMConfig`, what each may be from the error that refuses others,
commands from the command line's own application, and the reference from signatures and docstrings in the source.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from command_pages import command_section
from reference_pages import reference_section

from hf_compressm import CompreSSMConfig


DOCS = Path(__file__).parent
REFERENCE = """# Reference

Signatures and docstrings of the public names, made from the source by `python docs/generate.py`. What is not named
here may change without notice.
"""
MODULES = ("hf_compressm", "hf_compressm.numerics", "hf_compressm.scans")
PART = re.compile(r"(<!-- begin (\w+) ?(.*?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def settings_section(names: Sequence[str]) -> str:
    """A table of settings: name, default, what is allowed, meaning."""
    known = {field.name: field for field in dataclasses.fields(CompreSSMConfig)}
    rows = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for name in names:
        field = known[name]
        default = field.default
        allowed = allowed_values(name) + (", or None" if default is None and name != "per_layer" else "")
        rows.append(f"| `{name}` | `{default!r}` | {allowed} | {field.metadata['help']} |")
    return "\n".join(rows)


def allowed_values(name: str) -> str:
    """What a setting may be, as the error says that refuses a value which no setting can have."""
    try:
        CompreSSMConfig(**{name: object()})
    except ValueError as error:
        found = re.search(rf"^{name} must (?:be|lie in) (.*), got ", str(error))
        if found and found[1].startswith("one of "):
            return ", ".join(f"`{choice}`" for choice in re.findall(r"'\w+'", found[1]))
        if found:
            return found[1]
    raise LookupError(f"CompreSSMConfig does not say what {name} may be.")


def rendered(text: str) -> str:
    """A page with its generated parts made anew.

    Raises:
        ValueError: if settings are named in a page, and not each of them exactly once.
    """
    kinds: dict[str, Callable[[Sequence[str]], str]] = {
        "settings": settings_section,
        "command": command_section,
    }
    named = [name for _, kind, words, _ in PART.findall(text) if kind == "settings" for name in words.split()]
    fields = sorted(field.name for field in dataclasses.fields(CompreSSMConfig))
    if named and sorted(named) != fields:
        raise ValueError(f"Settings must be named once each; these are not: {sorted(set(named) ^ set(fields))}.")
    return PART.sub(lambda part: f"{part[1]}\n{kinds[part[2]](part[3].split())}\n\n{part[4]}", text)


def reference_page() -> str:
    """Every public name with its signature and docstring."""
    sections = (f"\n## `{module}`\n\n{reference_section([module])}\n" for module in MODULES)
    return REFERENCE + "".join(sections)


def main() -> None:
    """Write the pages."""
    options, reference = DOCS / "options.md", DOCS / "api.md"
    options.write_text(rendered(options.read_text(encoding="utf-8")), encoding="utf-8")
    reference.write_text(reference_page(), encoding="utf-8")
    sys.stdout.write(f"{options} and {reference} written\n")


if __name__ == "__main__":
    main()
