"""Checks of values that come from outside, such as files, and their short form in error messages."""

import math
import reprlib
from typing import Any


LONGEST_NAME = 500


LARGEST_NUMBER = 2**53
"""The largest number of states or steps: up to here, every reader of JSON keeps whole numbers exact."""


_EXCERPT = reprlib.Repr()
_EXCERPT.maxlevel = 2
_EXCERPT.maxstring = _EXCERPT.maxother = 80


def quoted(value: Any) -> str:
    """A value as error messages show it: short, even if the value is large, deeply nested or recursive."""
    text = _EXCERPT.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 0, such as a step."""
    return _is_whole(value) and value >= 0


def is_size(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_count(value) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def is_plain_text(value: Any) -> bool:
    """Whether a value is short text without characters that a page could read as markup."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and all(c.isalnum() or c in " ._-:,()" for c in value)


def is_name(value: Any) -> bool:
    """Whether a value is a dotted name, as modules and criteria have: no markup and no separator of paths."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and all(c.isalnum() or c in "._-" for c in value)
