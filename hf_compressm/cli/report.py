"""`hf-compressm report`: explain a run in tables and pictures."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_compressm.files.places import check_directory


def report(
    run_dir: Annotated[Path, typer.Argument(help="output_dir of a run, a checkpoint, or a saved model that was cut.")],
    output: Annotated[Path | None, typer.Option(help="Directory for the report; by default RUN_DIR.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path as JSON, for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Explain a run in tables and pictures: what was cut and when, and what it cost and saved.

    Writes report.html, one page that needs no other file. An unfinished run is read from its last complete checkpoint.
    """
    check_directory(run_dir if output is None else output)

    from hf_compressm.reports import write_report

    with Console(stderr=True, quiet=quiet).status("Drawing ..."):
        page = write_report(run_dir, output)
    if as_json and not quiet:
        typer.echo(json.dumps({"html": str(page)}, indent=2))
    elif not quiet:
        typer.echo(f"Written: {page}.")
