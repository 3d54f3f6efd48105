"""The report of a run: one HTML page that needs no other file."""

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hf_compressm.files.atomic import write_text
from hf_compressm.files.names import REPORT_FILE
from hf_compressm.files.places import check_directory
from hf_compressm.reports import tables
from hf_compressm.reports.pictures import draw_pictures
from hf_compressm.reports.rendering import own_version, render
from hf_compressm.reports.tables import Table
from hf_compressm.reports.traces import Run, read_run


ERRORS_IN_WORDS = (
    "A predicted error is an estimate on calibration data, as a share of the layer's output, unless a bound is given. "
    "Bounds hold only for S5 and LRU layers that were cut by their own Hankel singular values, and for the layer "
    "alone, not for the model around it."
)


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: its heading.
        table: its table; None for text alone.
        text: before the table; may be empty.
    """

    title: str
    table: Table | None = None
    text: str = ""


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write a page that explains a run.

    Args:
        directory: `output_dir` of a run, finished or not, a checkpoint, or a saved model that was cut.
        output: directory for `report.html`; by default `directory`.

    Returns:
        Path of the page.

    Raises:
        ValueError: if nothing in the directory records a cut, or if nothing can be written into `output`.
        ImportError: without matplotlib.
        OSError: from the file system.
    """
    output = Path(directory if output is None else output)
    check_directory(output)
    run = read_run(directory)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw_pictures(run, folder)
        embedded = [(picture, base64.b64encode(picture.path.read_bytes()).decode()) for picture in pictures]
    values = {
        "run": run,
        "headline": tables.headline(run.of_the_model()),
        "sections": sections(run),
        "version": own_version(),
    }
    page = output / REPORT_FILE
    write_text(page, render("report.html.jinja", pictures=embedded, **values))
    return page


def sections(run: Run) -> list[Section]:
    """The parts of a report that a run's traces allow."""
    found = [
        Section("Summary", tables.summary(run.of_the_model())),
        Section("Cuts", tables.cuts(run), ERRORS_IN_WORDS),
        Section("Layers", tables.layers(run)),
    ]
    chosen = tables.settings(run)
    if chosen.rows:
        found.append(Section("Settings", chosen, "How sizes were decided, and what else is not the default."))
    return found
