"""What is generated is what the code says now."""

import importlib

import pytest

from tests.docs.pages import DOCS


@pytest.fixture(scope="module")
def generate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("generate")


def test_the_options_are_as_generated(generate):
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    assert generate.rendered(text) == text, "run `python docs/generate.py`"


def test_the_reference_has_every_public_name(generate):
    page = generate.reference_page()
    for module in generate.MODULES:
        names = importlib.import_module(module).__all__
        assert [name for name in names if f"### `{name}`" not in page] == []


def test_a_page_that_leaves_out_a_setting_is_refused(generate):
    with pytest.raises(ValueError, match="round_to"):
        generate.rendered("<!-- begin settings tolerance -->\n<!-- end -->\n")


def test_every_setting_says_what_it_may_be(generate):
    assert generate.allowed_values("tolerance") == "[0, 1) (the share of energy a cut may discard)"
    assert generate.allowed_values("keep") == "`'largest'`, `'smallest'`, `'random'`"
    assert generate.allowed_values("round_to") == "a whole number of at least 1"
    assert generate.allowed_values("save_around_cuts") == "True or False"
