"""The cards of the examples' models, and the template that they come from."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_compressm.reports.card import TAGS, is_by_hand


ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
SCRIPTS = {path.name for path in (ROOT / "examples").glob("run_*.py")}


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_card_is_one_for_the_hub(path: Path) -> None:
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert card.data.license
    assert set(TAGS) <= set(card.data.tags)
    assert {result.metric_type for result in card.data.eval_results} >= {"loss", "accuracy"}
    assert is_by_hand(card.content)  # somebody has said what the data are
    for part in (
        "**Data**",
        "### What was cut, and when",
        "### How to load",
        "### Limitations",
        "Measured with torch",
    ):
        assert part in card.text


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_its_pictures_are_there_and_its_command_is_one_of_the_examples(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 3
    assert all((path.parent / name).is_file() for name in pictures)
    (script,) = re.findall(r"^python examples/(\S+\.py) ", text, flags=re.MULTILINE)
    assert script in SCRIPTS


def test_there_are_cards_and_the_template_is_the_package_s() -> None:
    assert len(CARDS) >= 2
    package = ROOT / "hf_compressm" / "reports" / "templates" / "card.md.jinja"
    assert (ROOT / "model_cards" / "template.md").resolve() == package
