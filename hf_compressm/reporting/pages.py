"""The report of a run: one HTML page that holds all it shows, and the same in Markdown with its pictures beside it."""

import base64
from dataclasses import dataclass
from pathlib import Path

from hf_compressm.durable import write_text
from hf_compressm.reporting import tables
from hf_compressm.reporting.pictures import draw_pictures
from hf_compressm.reporting.rendering import own_version, render
from hf_compressm.reporting.runs import Run, read_run
from hf_compressm.reporting.tables import Table


HTML_FILE, MARKDOWN_FILE, PICTURES_FOLDER = "report.html", "report.md", "report_figures"

ERRORS_IN_WORDS = (
    "A predicted error is an estimate on calibration data, as a share of the layer's output, unless a bound is given. "
    "Bounds hold for S5 and LRU layers that were cut by their own Hankel singular values, for no other layer, and for "
    "the layer alone, not for the model around it."
)


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: of it.
        table: its table; None for text alone.
        text: before the table; may be empty.
    """

    title: str
    table: Table | None = None
    text: str = ""


def write_report(directory: str | Path, output: str | Path | None = None) -> tuple[Path, Path]:
    """Explain a run to somebody who was not there.

    Args:
        directory: `output_dir` of a run, going on or ended, a checkpoint, or a saved model that was cut.
        output: directory for `report.html`, `report.md` and the folder `report_figures`; by default `directory`.

    Returns:
        Paths of the HTML page and of the Markdown.

    Raises:
        ValueError: if nothing in the directory tells of a cut.
        ImportError: without matplotlib.
        OSError: from the file system.
    """
    run = read_run(directory)
    output = Path(directory if output is None else output)
    output.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(run, output / PICTURES_FOLDER)
    common = {"run": run, "headline": tables.headline(run), "sections": sections(run), "version": own_version()}
    embedded = [(picture, base64.b64encode(picture.path.read_bytes()).decode()) for picture in pictures]
    page, summary = output / HTML_FILE, output / MARKDOWN_FILE
    write_text(page, render("report.html.jinja", pictures=embedded, **common))
    write_text(summary, render("report.md.jinja", pictures=pictures, folder=PICTURES_FOLDER, **common))
    return page, summary


def sections(run: Run) -> list[Section]:
    """The parts of a report that a run's traces allow."""
    found = [
        Section("Summary", tables.summary(run)),
        Section("Cuts", tables.cuts(run), ERRORS_IN_WORDS),
        Section("Layers", tables.layers(run)),
    ]
    chosen = tables.settings(run)
    if chosen.rows:
        found.append(Section("Settings", chosen, "How sizes were decided, and what else is not the default."))
    return found
