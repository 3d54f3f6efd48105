"""Checking values that may come from anybody, and showing them in errors."""

import math
import reprlib
from typing import Any


LONGEST_NAME = 500


LARGEST_NUMBER = 2**53
"""Of states, and of steps: whole numbers that every reader of JSON has."""


_EXCERPT = reprlib.Repr()
_EXCERPT.maxlevel = 2
_EXCERPT.maxstring = _EXCERPT.maxother = 80


def quoted(value: Any) -> str:
    """A value as an error shows it: short, however large, deep or tangled it is."""
    text = _EXCERPT.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def is_count(value: Any) -> bool:
    """Whole numbers from 0 on, such as steps."""
    return _is_whole(value) and value >= 0


def is_size(value: Any) -> bool:
    """Whole numbers from 1 on."""
    return is_count(value) and value >= 1


def is_number(value: Any) -> bool:
    """Finite numbers."""
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def is_plain_text(value: Any) -> bool:
    """Short text in which a page finds no markup."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and all(c.isalnum() or c in " ._-:,()" for c in value)


def is_name(value: Any) -> bool:
    """Dotted names of modules, and of criteria: nothing that a page or a path could take for its own."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and all(c.isalnum() or c in "._-" for c in value)
