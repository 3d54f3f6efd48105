"""`hf-compressm compress`: cut a saved model or a Trainer's checkpoint between two runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from hf_compressm.cli.options import OF_MEASURING, Expansion, expanded, read_settings
from hf_compressm.config import RANK_RULES, CompreSSMConfig
from hf_compressm.data.sources import SequenceSource, TextSource
from hf_compressm.files.places import check_new_directory


if TYPE_CHECKING:
    from hf_compressm.compression import CompressionResult


OF_ONE_CUT = (*RANK_RULES, "keep", *OF_MEASURING, "sequential", "refit_steps", "optimizer_state", "on_nonfinite")


@expanded(
    settings=Expansion(CompreSSMConfig, "How much is cut, and how", OF_ONE_CUT),
    text=Expansion(TextSource, "Calibration data"),
    sequences=Expansion(SequenceSource, "Calibration data"),
)
def compress(
    model: Annotated[str, typer.Argument(help="Directory of a saved model or checkpoint, or an id on the Hub.")],
    output: Annotated[Path, typer.Option(help="Directory to write; it must be new or empty.")],
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings; options override it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a calibration batch.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    *,
    settings: dict[str, Any],
    text: dict[str, Any],
    sequences: dict[str, Any],
) -> None:
    """Cut a saved model, or a checkpoint with its optimizer, and write it to another directory.

    The next launch resumes from there with the smaller model, under FSDP too.
    """
    wanted = read_settings(config, settings)
    check_new_directory(output, model if Path(model).is_dir() else None)

    from hf_compressm.cli.inputs import calibration_batches, local_directory, measuring
    from hf_compressm.reports import compress_checkpoint

    console = Console(stderr=True, quiet=quiet)
    with console.status("Reading the model and the calibration data ..."):
        directory = local_directory(model)
        batches = calibration_batches(directory, wanted, {**text, **sequences}, batch_size)
    with console.status("Measuring and cutting ..."), measuring(model, batches):
        result = compress_checkpoint(directory, output, wanted, batches)
    if as_json and not quiet:
        typer.echo(json.dumps(_summary(result, output), indent=2, allow_nan=False))
    elif not quiet:
        Console().print(_table(result))
        typer.echo(_closing_line(result, output))


def _summary(result: "CompressionResult", output: Path) -> dict[str, Any]:
    numbers = {name: getattr(result, name) for name in ("changed", "parameters_before", "parameters_after", "seconds")}
    sizes = {name: getattr(result, name) for name in ("state_sizes_before", "state_sizes_after")}
    return {"output": str(output), **numbers, **sizes, **result.plan.to_dict()}


def _table(result: "CompressionResult") -> Table:
    """One row per layer."""
    table = Table(Column("layer", overflow="fold"), "states", "energy kept", "predicted error", "status")
    for layer in result.plan.layers:
        sizes = f"{layer.state_size} -> {layer.new_state_size}"
        status = f"{layer.status}: {layer.reason}" if layer.reason else layer.status
        table.add_row(layer.name, sizes, f"{layer.energy_kept:.4f}", f"{layer.predicted_error:.4f}", status)
    return table


def _closing_line(result: "CompressionResult", output: Path) -> str:
    if not result.changed:
        return f"Nothing was cut; {output} holds the unchanged model. A larger tolerance would cut more."
    change = result.plan.predicted_loss_change
    expected = "" if change is None else f", loss {change:+.4f} expected"
    return (
        f"{result.parameters_before:,} -> {result.parameters_after:,} parameters in {result.seconds:.1f} s{expected}, "
        f"written to {output}."
    )
