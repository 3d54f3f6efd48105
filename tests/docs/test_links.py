"""Relative links lead to a file that is there, and their anchors to a heading in it."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, LINKED_PAGES, PAGES, ROOT, anchors, prose


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(page: Path) -> list[str]:
    """Targets that lead nowhere; addresses on the network are not looked at."""
    broken = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", LINKED_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A head, with `code`\n\n[a](no.md) [b](page.md#a-head-with-code) [c](#none) ![d](no.png)\n")
    assert broken_links(page) == ["no.md", "#none", "no.png"]


def test_every_page_is_in_the_index_and_every_picture_on_a_page():
    index = LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))
    assert {page.name for page in PAGES} - {"README.md"} <= {target.partition("#")[0] for target in index}
    shown = {Path(target).name for page in PAGES for target in LINK.findall(page.read_text(encoding="utf-8"))}
    assert {picture.name for picture in (DOCS / "figures").iterdir()} <= shown
