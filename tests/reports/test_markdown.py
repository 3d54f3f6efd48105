"""Text of strangers inside Markdown."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm.reports.markdown import code, escaped, table


READABLE = (
    "backbone.layers.0.ssm",
    "0.1255 (step 11)",
    "64 → 8",
    "26,058",
    "S5ForCausalLM: 64 states",
    "a_b",
    "10 %",
    "torch 2.15.0+cu132, 2 thread(s) of the log's",
)
MEANINGFUL = (
    "<b>x</b>",
    "[a](b)",
    "![a](b)",
    "*x*",
    "_x_",
    "__x__",
    "`x`",
    "a | b",
    "https://example.org",
    "www.example.org",
    "- item",
    "1. item",
    "# head",
    "> quote",
    "&lt;",
    "\\",
    "a@b.c",
    "$x$",
    "~~x~~",
    "---",
    "| --- |",
)


@pytest.mark.parametrize("text", READABLE)
def test_what_means_nothing_stays_readable(text: str) -> None:
    assert escaped(text) == text


@pytest.mark.parametrize("text", MEANINGFUL)
def test_what_means_something_is_written_in_other_characters(text: str) -> None:
    written = escaped(text)
    assert written != text
    assert re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), written) == text


@given(st.text())
def test_any_text_is_one_line_without_characters_that_mean_something(text: str) -> None:
    written = escaped(text)
    assert "\n" not in written
    assert not set("<>[]`*|\\!") & set(re.sub(r"&#\d+;", "", written))
    assert code(text).count("`") in (0, 2)
    assert "|" not in code(text)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
def test_a_table_keeps_its_shape_whatever_its_cells_hold(rows: list[tuple[str, str]]) -> None:
    lines = table(("one", "two"), rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line.count("|") == 3 for line in lines)
