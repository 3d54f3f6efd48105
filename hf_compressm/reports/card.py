"""The model card of a cut model: a card of its own, or a section in one that somebody else wrote.

The section is between two comments and is rewritten each time; everything around it stays as the user left it. The
first comment holds a checksum of the rest, which shows whether only programs wrote the card or a person changed it.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from hf_compressm.files.names import CARD_FILE, FIGURES_FOLDER
from hf_compressm.reports import tables
from hf_compressm.reports.pictures import Picture, present_pictures
from hf_compressm.reports.rendering import render
from hf_compressm.reports.report import ERRORS_IN_WORDS
from hf_compressm.reports.traces import Run, find_run
from hf_compressm.utils.text import decoded


logger = logging.get_logger(__name__)

TAGS = ("compressm", "state-space-model", "model-compression")
ON_A_CARD = ("before_after", "training", "spectra")
"""Pictures that a card shows; the folder has all of them."""
LONGEST_ID = 200
_BEGIN = re.compile(r"<!-- compressm: begin, the rest (?:is by hand|was ([0-9a-f]{8})); do not write below -->")
_BY_HAND_BEGIN = "<!-- compressm: begin, the rest is by hand; do not write below -->"
_END = "<!-- compressm: end, write below -->"
_SECTION = re.compile(f"{_BEGIN.pattern}.*?{re.escape(_END)}", re.DOTALL)
_HEAD = re.compile(r"\A---\r?\n(.*?\n)?---\r?\n", re.DOTALL)
_BY_TRAINER = "This model card has been generated automatically"
_BY_US = "<!-- This model card was begun by hf_compressm. Complete it, and remove this line. -->"
_OURS = "Validation "
"""Prefix of the names of metrics that are written here."""
_TASKS = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the run.

    Attributes:
        name: of the model.
        repo_id: on the Hub; None where it has none yet.
        base_model: id on the Hub of the model that training began with, if any.
        datasets: ids or names of the training data.
        pictures: those in `compressm_figures` beside the card.
    """

    name: str
    repo_id: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    pictures: Sequence[Picture] = ()


def write_card(run: Run, facts: CardFacts, existing: str | None = None, by_hand: bool | None = None) -> str:
    """The text of a model card.

    Args:
        run: the run that the model comes from.
        facts: what the card says besides the run.
        existing: card to complete; None for a new one.
        by_hand: whether a person wrote or changed that card; None to find out from the card.
    """
    fresh = _fresh(run, facts)
    if existing is None:
        return _sealed(fresh)
    by_hand = is_by_hand(existing) if by_hand is None else by_hand
    if not by_hand and _BY_US in existing:
        return _sealed(fresh)
    card = _with_section(_with_metadata(existing, _metadata(run, facts)), fresh)
    return card if by_hand else _sealed(card)


def card_of(directory: str | Path, repo_id: str | None = None) -> str | None:
    """The model card that a directory should have, judging by its files; nothing is written.

    Args:
        directory: of a saved model or checkpoint.
        repo_id: on the Hub, if it has one.

    Returns:
        The text. If nothing in the directory records a cut, that of the present card, or None without one.

    Raises:
        ValueError: if the history or the present card cannot be read.
    """
    directory = Path(directory)
    path = directory / CARD_FILE
    existing = decoded(path.read_bytes(), path) if path.is_file() else None
    found = find_run(directory)
    run = None if found is None else found.of_the_model()
    if run is None or not (run.cuts or run.record):
        return None if existing is None else without_section(existing)
    name = repo_id.split("/")[-1] if repo_id else directory.resolve().name
    facts = CardFacts(name, repo_id, pictures=present_pictures(directory / FIGURES_FOLDER))
    return write_card(run, facts, existing)


def without_section(card: str) -> str:
    """A card without what was written here about cuts, for a model that has none."""
    if not _SECTION.search(card):
        return card
    metadata = _read_metadata(card) or {}
    if isinstance(tags := metadata.get("tags"), list):
        metadata["tags"] = [tag for tag in tags if tag not in TAGS]
    if _may_be_replaced(metadata.get("model-index")):
        del metadata["model-index"]
    rest = _SECTION.sub("", _HEAD.sub("", card, count=1), count=1).rstrip()
    return f"---\n{_dump(metadata)}---\n{rest}\n" if metadata else f"{rest.lstrip()}\n"


def is_by_hand(card: str) -> bool:
    """Whether a person wrote or changed a card; if not, only programs did."""
    found = _BEGIN.search(card)
    if found is None:
        return _BY_TRAINER not in card
    return found[1] != _checksum(card)


def with_metadata_of(card: str, other: str) -> str:
    """A card with added metadata: those that only the other card has."""
    return _with_metadata(card, _read_metadata(other) or {})


def _fresh(run: Run, facts: CardFacts) -> str:
    """A new card; its section is the one that every card of the run gets."""
    suffix = next((suffix for suffix in _TASKS if run.model_class.endswith(suffix)), "")
    return render(
        "card.md.jinja",
        metadata=_dump(_metadata(run, facts)),
        name=facts.name,
        headline=tables.headline(run),
        base_model=_plain_id(facts.base_model),
        datasets=facts.datasets,
        begin=_BY_HAND_BEGIN,
        end=_END,
        by_us=_BY_US,
        stock="auto_map" not in run.config,
        cuts=tables.cuts(run),
        summary=tables.summary(run),
        pictures=[picture for picture in facts.pictures if picture.path.stem in ON_A_CARD],
        folder=FIGURES_FOLDER,
        auto_class=f"AutoModel{suffix}",
        repo_id=_plain_id(facts.repo_id),
        limits=ERRORS_IN_WORDS,
    )


def _metadata(run: Run, facts: CardFacts) -> dict[str, Any]:
    """What the Hub reads from a card's head."""
    found: dict[str, Any] = {"library_name": "transformers", "tags": list(TAGS)}
    if base_model := _plain_id(facts.base_model):
        found["base_model"] = base_model
    if datasets := [name for name in facts.datasets if _plain_id(name)]:
        found["datasets"] = datasets
    values = [(name, run.series(f"eval_{name}")[-1][1]) for name in run.metrics()]
    if values:
        task = next((task for suffix, task in _TASKS.items() if run.model_class.endswith(suffix)), "other")
        result = {
            "task": {"type": task},
            "dataset": {"name": ", ".join(facts.datasets) or "evaluation data of the run", "type": "unknown"},
            "metrics": [{"type": name, "value": value, "name": f"{_OURS}{name}"} for name, value in values],
        }
        found["model-index"] = [{"name": facts.name, "results": [result]}]
    return found


def _with_metadata(card: str, more: Mapping[str, Any]) -> str:
    """A card with missing metadata added; a head that cannot be read is left alone."""
    present = _read_metadata(card)
    if present is None:
        logger.warning("The metadata of the model card cannot be read as YAML and stay as they are.")
        return card
    merged = dict(present)
    for key, value in more.items():
        if key == "tags":
            tags = present.get("tags") or []
            tags = [tags] if isinstance(tags, str) else list(tags)
            merged[key] = [*tags, *(tag for tag in value if tag not in tags)]
        elif key not in present or (key == "model-index" and _may_be_replaced(present[key])):
            merged[key] = value
    if merged == present:
        return card
    return f"---\n{_dump(merged)}---\n{_HEAD.sub('', card, count=1)}"


def _read_metadata(card: str) -> dict[str, Any] | None:
    """The mapping at a card's head; empty without one, None if it cannot be read."""
    head = _HEAD.match(card)
    if head is None:
        return {}
    try:
        values = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return None
    return values if isinstance(values, dict) else None


def _may_be_replaced(index: Any) -> bool:
    """Whether all results in a `model-index` were written here, earlier in the run."""
    try:
        results = [result for item in index for result in item.get("results") or ()]
        return all(metric["name"].startswith(_OURS) for result in results for metric in result["metrics"])
    except (AttributeError, KeyError, TypeError):  # of another form, and not ours
        return False


def _with_section(card: str, fresh: str) -> str:
    """A card with the section of a fresh one, in place of its own or at the end."""
    section = _SECTION.search(fresh)
    assert section is not None  # the template has one
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section[0], card, count=1)
    return f"{card.rstrip()}\n\n{section[0]}\n"


def _sealed(card: str) -> str:
    """A card that only programs wrote, with the checksum that shows this later."""
    begin = f"<!-- compressm: begin, the rest was {_checksum(card)}; do not write below -->"
    return _BEGIN.sub(begin, card, count=1)


def _checksum(card: str) -> str:
    """The checksum of everything except the section."""
    rest = _SECTION.sub("", card, count=1)
    return f"{zlib.crc32(rest.strip().encode()):08x}"


def _dump(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)


def _plain_id(name: str | None) -> str | None:
    """A name in the form of the Hub's ids, or None: it is put into code and links."""
    return name if name and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and len(name) <= LONGEST_ID else None
