"""`hf-compressm analyze`: what could be cut from a saved model, at several tolerances."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hf_compressm.cli.options import OF_MEASURING, Expansion, expanded, read_settings
from hf_compressm.cli.serving import MEMORY, serving_table
from hf_compressm.config import CompreSSMConfig
from hf_compressm.data.sources import SequenceSource, TextSource
from hf_compressm.files.places import check_file


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_compressm.compression import Alternative, StateCost


TOLERANCES = "0.01,0.02,0.05,0.1,0.2"


@expanded(
    settings=Expansion(CompreSSMConfig, "How states are ranked", OF_MEASURING),
    text=Expansion(TextSource, "Calibration data"),
    sequences=Expansion(SequenceSource, "Calibration data"),
)
def analyze(
    model: Annotated[str, typer.Argument(help="Directory of a saved model or checkpoint, or an id on the Hub.")],
    tolerances: Annotated[
        str, typer.Option(help="Shares of the sum of the HSVs that may be cut, with commas.")
    ] = TOLERANCES,
    plot: Annotated[Path | None, typer.Option(help="Image to draw: spectra and recommended sizes.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings; options override it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a calibration batch.")] = 8,
    serving: Annotated[
        bool, typer.Option("--serving", help="Also what serving costs: bytes of state, sequences, bytes for a token.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help=f"Memory for states where the model is served; brings --serving with it ({MEMORY} unless given).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, spectra included.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    *,
    settings: dict[str, Any],
    text: dict[str, Any],
    sequences: dict[str, Any],
) -> None:
    """Show what could be cut from a saved model: recommended state sizes, predicted errors, and what a cut saves.

    Nothing is changed. Use the tolerance that you choose with `hf-compressm compress --tolerance`, or in a training
    run. The sizes are those after one cut; in a run each further cut may discard that share again.
    """
    wanted, shares = read_settings(config, settings), _numbers(tolerances)
    if plot is not None:
        check_file(plot)

    from hf_compressm.checkpoints import read_saved
    from hf_compressm.cli.inputs import calibration_batches, local_directory, measuring
    from hf_compressm.compression import compare_tolerances, memory_bytes
    from hf_compressm.reports.plots.analysis import plot_alternatives
    from hf_compressm.reports.plots.figures import check_format

    if plot is not None:
        check_format(plot)
    room = memory_bytes(memory or MEMORY) if serving or memory else None
    console = Console(stderr=True, quiet=quiet)
    with console.status("Reading the model and the calibration data ..."):
        directory = local_directory(model)
        batches = calibration_batches(directory, wanted, {**text, **sequences}, batch_size)
        loaded = read_saved(directory).load().eval()
    with console.status("Measuring ..."), measuring(model, batches):
        found = compare_tolerances(loaded, shares, wanted, batches)
    if plot is not None:
        plot_alternatives(found, plot)
    if quiet:
        return
    if as_json:
        typer.echo(json.dumps(_summary(loaded, found, room), indent=2, allow_nan=False))
        return
    Console().print(_table(loaded, found))
    if room is not None:
        Console().print(serving_table(_headings(found), _costs(loaded, found), room))
    _print_reasons(found[0])
    if plot is not None:
        typer.echo(f"Drawn in {plot}.")


def _numbers(text: str) -> list[float]:
    """The tolerances; each is checked when it becomes a setting."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--tolerances takes numbers with commas between them, such as {TOLERANCES}; got {text!r}."
        ) from None
    return sorted(set(numbers))


def _headings(found: Sequence["Alternative"]) -> list[str]:
    return ["now", *(f"{alternative.tolerance:g}" for alternative in found)]


def _costs(model: "PreTrainedModel", found: Sequence["Alternative"]) -> list["StateCost"]:
    """What one sequence's state costs now and at each tolerance."""
    from hf_compressm.compression import state_cost

    return [state_cost(model), *(state_cost(model, alternative.plan) for alternative in found)]


def _summary(model: "PreTrainedModel", found: Sequence["Alternative"], room: int | None) -> dict[str, Any]:
    """Everything that was found, JSON-ready; with what serving costs, if there is a memory for states."""
    from hf_compressm.compression import count_state_bytes

    summary: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "state_bytes": count_state_bytes(model),
        "tolerances": [
            {
                "tolerance": alternative.tolerance,
                "parameters": alternative.parameters,
                "state_bytes": alternative.state_bytes,
                **alternative.plan.to_dict(),
            }
            for alternative in found
        ],
    }
    if room is not None:
        places = [summary, *summary["tolerances"]]
        for place, cost in zip(places, _costs(model, found), strict=True):
            place["serving"] = {"memory": room, "cache": cost.to_dict(room)}
    return summary


def _table(model: "PreTrainedModel", found: Sequence["Alternative"]) -> Table:
    """A row per layer, a column per tolerance: recommended size and predicted error; last rows are the model's."""
    from hf_compressm.compression import count_state_bytes

    shared = _shared_prefix([layer.name for layer in found[0].plan.layers])
    title = f"States (predicted relative error) of {type(model).__name__} at each tolerance"
    caption = f"layers in {shared.removesuffix('.')}" if shared else None
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, caption=caption)
    table.add_column("layer", overflow="fold", min_width=11)
    for heading in _headings(found):
        table.add_column(heading, justify="right")
    for rows in zip(*(alternative.plan.layers for alternative in found), strict=True):
        cells = [f"{row.new_state_size} ({row.predicted_error:.2f})" if row.status == "cut" else "-" for row in rows]
        table.add_row(rows[0].name.removeprefix(shared), str(rows[0].state_size), *cells)
    table.add_section()
    sizes = [f"{alternative.parameters:,}" for alternative in found]
    table.add_row("parameters", f"{model.num_parameters():,}", *sizes)
    state = [f"{alternative.state_bytes:,}" for alternative in found]
    table.add_row("state bytes", f"{count_state_bytes(model):,}", *state)
    changes = [alternative.plan.predicted_loss_change for alternative in found]
    if any(change is not None for change in changes):
        table.add_row("expected loss", "", *("-" if change is None else f"{change:+.4f}" for change in changes))
    return table


def _shared_prefix(names: Sequence[str]) -> str:
    """The dotted prefix that all names share; a narrow screen has no room to repeat it."""
    shared = names[0] if len(names) > 1 else ""
    while shared and not all(name.startswith(f"{shared}.") for name in names):
        shared = shared.rpartition(".")[0]
    return f"{shared}." if shared else ""


def _print_reasons(alternative: "Alternative") -> None:
    """Print why layers are not cut at one tolerance; layers that cannot be measured are not cut at any."""
    for layer in alternative.plan.layers:
        if layer.status == "skipped":
            typer.echo(f"{layer.name} cannot be cut: {layer.reason}.")
